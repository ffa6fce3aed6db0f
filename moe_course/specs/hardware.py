"""Accelerators as their makers describe them: peak rates, bandwidth, capacity, links.
Decimal units.

Each entry names its maker's data sheet; figures are used in book/bandwidth/roofline.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One accelerator.

    Peaks are dense (without structured sparsity), in FLOP/s, with fp32 accumulation;
    None where the chip has no such units. `link_bandwidth` is what one chip can send to
    its neighbours, one direction, in bytes/s. Peaks are upper bounds from data sheets:
    no program reaches them.
    """

    name: str
    bf16: float  # FLOP/s; fp16 has the same rate on all of these
    fp8: float | None  # FLOP/s
    bandwidth: float  # bytes/s of its own memory
    capacity: (
        float  # bytes, the sheet's GB taken as 10^9 (an H100 of "80 GB" reports 85.5)
    )
    link: str
    link_bandwidth: float  # bytes/s, one direction
    source: str

    def ridge(self) -> float:
        """FLOP per byte at which bf16 arithmetic and memory take equally long."""
        return self.bf16 / self.bandwidth


_NVLINK3, _NVLINK4, _NVLINK5, _PCIE4 = (
    "NVLink 3",
    "NVLink 4",
    "NVLink 5",
    "PCIe 4.0 x16",
)

# Where a data sheet prints rates with structured sparsity, the dense rate is half of it.
accelerators: dict[str, Accelerator] = {
    a.name: a
    for a in (
        Accelerator(
            "A100-40GB", 312e12, None, 1555e9, 40e9, _NVLINK3, 300e9,
            "NVIDIA A100 data sheet (SXM): 312 TFLOPS, 1,555 GB/s, NVLink 600 GB/s both directions",
        ),
        Accelerator(
            "A100-80GB", 312e12, None, 2039e9, 80e9, _NVLINK3, 300e9,
            "NVIDIA A100 data sheet (SXM): 312 TFLOPS, 2,039 GB/s (PCIe card: 1,935), NVLink 600 GB/s both directions",
        ),
        Accelerator(
            "H100-SXM", 989.4e12, 1978.9e12, 3350e9, 80e9, _NVLINK4, 450e9,
            "NVIDIA H100 data sheet: 1,979 and 3,958 TFLOPS with sparsity, halved; whitepaper 989.4 and 1,978.9; "
            "3.35 TB/s, NVLink 900 GB/s both directions",
        ),
        Accelerator(
            "H200", 989.4e12, 1978.9e12, 4800e9, 141e9, _NVLINK4, 450e9,
            "NVIDIA H200 data sheet: 1,979 and 3,958 TFLOPS with sparsity, halved; 4.8 TB/s, 141 GB, "
            "NVLink 900 GB/s both directions",
        ),
        Accelerator(
            "B200", 2250e12, 4500e12, 7750e9, 180e9, _NVLINK5, 900e9,
            "NVIDIA HGX B200 (not GB200): 4.5 and 9 PFLOPS with sparsity, halved; 62 TB/s over eight chips; "
            "NVLink 1.8 TB/s both directions",
        ),
        Accelerator(
            "L4", 121e12, 242.5e12, 300e9, 24e9, _PCIE4, 32e9,
            "NVIDIA L4 product page: 242 and 485 TFLOPS with sparsity, halved; 300 GB/s; PCIe 64 GB/s both directions",
        ),
        Accelerator(
            "RTX-4090", 165.2e12, 330.3e12, 1008e9, 24e9, _PCIE4, 32e9,
            "NVIDIA Ada whitepaper 2.02, appendix A: bf16 165.2 and fp8 330.3 TFLOPS with fp32 accumulation, dense; "
            "fp16 accumulation doubles them; 1,008 GB/s",
        ),
    )
}  # fmt: skip
