"""Watch a Triton kernel run in Triton's interpreter: what each program loads and stores, and where.

For instance::

    with trace({"x": x, "y": y}) as seen:
        kernel[grid](x, y, ...)
    seen.traffic("load", "x").bytes     # read from x, by all programs
    seen.programs("y")                  # which program stored each element of y

The interpreter runs one program after the other on the CPU and forgives what a GPU does not. So an access outside the
tensor that its pointer was made of is refused before memory is touched, lanes that a mask leaves out without `other`
are NaN in place of 0, and elements that two programs of a launch fight over are noticed, as is what Triton's compiler
would refuse.

Needs TRITON_INTERPRET=1 before triton is first imported. Nothing else of the course is needed here, nor triton until
`trace` is called: the judge's worker runs this very file.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import numpy as np

SECTOR = 32  # bytes that a GPU's memory moves at the least
MOST_NOTES = 20  # of one kind
# A pointer's upper bits carry the number of the tensor that it was made of: addresses have no more than 48.
TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64(2**48 - 1)


class OutOfBoundsError(IndexError):
    """A program touches memory outside the tensor that its pointer was made of; the text says which, and how far."""


@dataclass(frozen=True)
class Access:
    """One load, store or atomic of one program in one tensor."""

    program: int
    kind: str  # "load", "store" or "atomic"
    tensor: str
    elements: Any  # the distinct elements touched, as indices into the flattened tensor
    bytes: int
    sectors: int  # pieces of 32 aligned bytes that hold them
    floating: bool


@dataclass(frozen=True)
class Traffic:
    """Sums over accesses. An element that two operations touch counts twice, once it may come from a cache."""

    operations: int
    elements: int
    bytes: int
    moved: int  # bytes of whole sectors: what scattered accesses cost


class _Region:
    """A tensor's elements in memory."""

    def __init__(self, name: str, tensor: Any, given: bool) -> None:
        self.name, self.tensor, self.given = name, tensor, given
        self.base, self.itemsize = tensor.data_ptr(), tensor.element_size()
        self.shape, self.strides = tuple(tensor.shape), tuple(tensor.stride())
        self.layout = (self.base, self.shape, self.strides, self.itemsize)
        self.storage = (tensor.untyped_storage().data_ptr(), self.itemsize)
        sizes = list(self.shape)
        weights = [int(np.prod(sizes[d + 1 :])) for d in range(len(sizes))]
        dims = sorted(
            (d for d in range(len(sizes)) if sizes[d] > 1),
            key=lambda d: -self.strides[d],
        )
        self.dims = [(sizes[d], self.strides[d], weights[d]) for d in dims]
        self.empty = 0 in sizes
        reach = 1
        for size, stride, _ in reversed(self.dims):
            if stride < reach and not self.empty:
                raise ValueError(
                    f"{name}: elements of shape {list(self.shape)}, strides {list(self.strides)} share memory"
                )
            reach = (size - 1) * stride + reach
        self.end = self.base + (0 if self.empty else reach * self.itemsize)

    def index(self, addresses: Any) -> Any:
        """Index into the flattened tensor of the element at each address, -1 where there is none."""
        if self.empty:
            return np.full(addresses.shape, -1)
        offset, rest = np.divmod(addresses.astype(np.int64) - self.base, self.itemsize)
        inside, flat = rest == 0, np.zeros_like(offset)
        for size, stride, weight in self.dims:
            place, offset = np.divmod(offset, stride)
            inside &= (place >= 0) & (place < size)
            flat += place * weight
        return np.where(inside & (offset == 0), flat, -1)

    def addresses(self) -> Any:
        """Address of every element, in the tensor's shape."""
        places = np.indices(self.shape).reshape(len(self.shape), -1)
        offsets = np.array(self.strides, dtype=np.int64) @ places.astype(np.int64)
        return (self.base + self.itemsize * offsets).reshape(self.shape)

    def how_far(self, addresses: Any) -> tuple[int, str]:
        """The farthest of some addresses outside: in elements, and in words."""
        addresses = addresses.astype(np.int64)
        before = int(self.base - addresses.min())
        past = int(addresses.max()) - self.end + self.itemsize
        shape = f"{self.name} (shape {list(self.shape)})"
        if before <= 0 and past <= 0:
            return 0, f"between the elements of {shape}"
        count = -(-max(before, past) // self.itemsize)
        where = "before the beginning" if before >= past else "past the end"
        far = f"{count:,} element{'s' * (count != 1)} {where} of {shape}"
        return count, far if addresses.size == 1 else f"up to {far}"


class Trace:
    """What was seen. Programs are numbered x + X·(y + Y·z), and on over several launches."""

    def __init__(self, tensors: Mapping[str, Any] | None) -> None:
        self.launches: list[tuple[int, int, int]] = []
        self.accesses: list[Access] = []
        self.races: list[str] = []  # two programs of one launch at one element
        self.unwritten: list[str] = []  # loads of what nobody has stored
        self.refused: list[str] = []  # what a compiler would not take
        self.outside = ""  # the access that ended a kernel
        self.dots: set[tuple[int, int, int]] = set()  # M, N, K of every tl.dot
        self._regions: list[_Region] = []
        self._writers: dict[tuple[int, int], Any] = {}
        self._strict = tensors is not None
        self._first = 0  # number of the launch's first program
        self._from = 0  # its first access
        self._kernels: set[Any] = set()
        for name, tensor in (tensors or {}).items():
            self._add(name, tensor, given=True)

    # --- Asking ---

    @property
    def count(self) -> int:
        """Programs run."""
        return sum(x * y * z for x, y, z in self.launches)

    @property
    def names(self) -> list[str]:
        """The tensors: those named at the beginning, and others that kernels were given."""
        return [region.name for region in self._regions]

    def traffic(
        self, kind: str, tensor: str | None = None, program: int | None = None
    ) -> Traffic:
        """All accesses of a kind ("load", "store", "atomic"); of one tensor, of one program."""
        found = self._found(kind, tensor, program)
        return Traffic(
            len(found),
            sum(len(a.elements) for a in found),
            sum(a.bytes for a in found),
            SECTOR * sum(a.sectors for a in found),
        )

    def programs(self, tensor: str) -> Any:
        """Array of the tensor's shape: the number of the program that stored each element last, -1 for nobody."""
        region = self._region(tensor)
        return self._writer(region, region.addresses())

    def touched(self, kind: str, tensor: str, program: int | None = None) -> Any:
        """Array of the tensor's shape: True where a program, or any, has loaded ("load") or stored ("store") it."""
        shape = self._region(tensor).shape
        mask = np.zeros(int(np.prod(shape)), dtype=bool)
        for access in self._found(kind, tensor, program):
            mask[access.elements] = True
        return mask.reshape(shape)

    def stored(self, tensor: Any) -> Any:
        """Array of the tensor's shape: True where a program has stored the element, under whatever name."""
        region = _Region("", tensor, given=False)
        return self._writer(region, region.addresses()) >= 0

    def loaded(self, tensor: Any) -> Any:
        """Array of the tensor's shape: True where a program has loaded the element, under whatever name."""
        asked = _Region("", tensor, given=False)
        mask = np.zeros(int(np.prod(asked.shape)), dtype=bool)
        for region in self._sharing(tensor):
            index = asked.index(region.addresses().ravel())
            for access in self._found("load", region.name, None):
                own = index[access.elements]
                mask[own[own >= 0]] = True
        return mask.reshape(asked.shape)

    def changed(self, tensor: Any) -> bool:
        """Whether a program has stored into the tensor's memory, under whatever name."""
        names = {region.name for region in self._sharing(tensor)}
        return any(a.kind != "load" and a.tensor in names for a in self.accesses)

    def _sharing(self, tensor: Any) -> list[_Region]:
        memory = tensor.untyped_storage().data_ptr()
        return [region for region in self._regions if region.storage[0] == memory]

    def _found(
        self, kind: str, tensor: str | None, program: int | None
    ) -> list[Access]:
        if tensor is not None:
            self._region(tensor)
        return [
            a
            for a in self.accesses
            if a.kind == kind
            and tensor in (None, a.tensor)
            and program in (None, a.program)
        ]

    def _region(self, name: str) -> _Region:
        for region in self._regions:
            if region.name == name:
                return region
        raise ValueError(f"no tensor {name!r} was seen; there are {self.names}")

    # --- Noting ---

    def _add(self, name: str, tensor: Any, given: bool) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is on {tensor.device}: the interpreter is watched on CPU tensors"
            )
        region = _Region(name, tensor, given)
        if any(region.layout == other.layout for other in self._regions):
            return
        memory = region.storage[0]
        given = given or any(r.given and r.storage[0] == memory for r in self._regions)
        region.given = given
        number = sum(other.name.split("#")[0] == name for other in self._regions)
        if number:
            region.name = f"{name}#{number + 1}"
        self._regions.append(region)

    def argument(self, name: str, value: Any) -> None:
        """A kernel is launched with this argument."""
        value = getattr(value, "base", None) if _is_descriptor(value) else value
        if isinstance(value, tuple):
            for place, entry in enumerate(value):
                self.argument(f"{name}[{place}]", entry)
        elif hasattr(value, "untyped_storage"):
            self._add(name, value, given=not self._strict)

    def launch(self, grid: tuple[int, int, int]) -> None:
        self._first, self._from = self.count, len(self.accesses)
        self.launches.append(grid)

    def launched(self) -> None:
        """A launch has ended: what was loaded first and stored later, by another program, is a race, too."""
        own = self.accesses[self._from :]
        stored = {self._region(a.tensor).storage[0] for a in own if a.kind != "load"}
        if self.races or not stored:
            return
        for access in own:
            region = self._region(access.tensor)
            if access.kind != "load" or region.storage[0] not in stored:
                continue
            writer = self._writer(region, region.addresses().ravel()[access.elements])
            others = (writer >= self._first) & (writer != access.program)
            if others.any():
                self._remark(
                    self.races,
                    f"program {access.program} loads element {self._where(region, access.elements[others])} of "
                    f"{region.name}, which program {int(writer[others][0])} of the same launch stores",
                )

    def kernel(self, function: Any) -> None:
        """A kernel, or what it calls, is about to run."""
        if function not in self._kernels:
            self._kernels.add(function)
            for text in _refused(function):
                self._remark(self.refused, text)

    def tag(self, tensor: Any) -> int:
        """The number that a pointer to this tensor carries; 0 where it was not seen as an argument."""
        layout = (
            tensor.data_ptr(),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.element_size(),
        )
        for number, region in enumerate(self._regions, 1):
            if region.layout == layout:
                return number
        return 0

    def access(
        self, kind: str, pointers: Any, mask: Any, width: int, at: Any, floating: bool
    ) -> Any:
        """Note one operation; the plain addresses of its lanes. Raises OutOfBoundsError."""
        marked = np.asarray(pointers)
        plain = marked & ADDRESS
        active = np.broadcast_to(np.asarray(mask), marked.shape).astype(bool)
        lanes, tags = plain[active], (marked >> TAG_SHIFT)[active]
        grid = self.launches[-1]
        program = self._first + at[0] + grid[0] * (at[1] + grid[1] * at[2])
        for tag in np.unique(tags):
            own = lanes[tags == tag]
            # Of a pointer that comes from elsewhere, any tensor will do.
            regions = self._regions[tag - 1 : tag] if tag else self._regions
            for region in regions:
                index = region.index(own)
                if width > region.itemsize:
                    last = own + np.uint64(width - region.itemsize)
                    index = np.where(region.index(last) >= 0, index, -1)
                here = index >= 0
                if here.any():
                    self._note(kind, region, own[here], index[here], program, floating)
                own = own[~here]
                if not own.size:
                    break
            if own.size:
                self._refuse(kind, own, regions, program, at)
        return plain

    def _note(
        self,
        kind: str,
        region: _Region,
        addresses: Any,
        index: Any,
        program: int,
        floating: bool,
    ) -> None:
        elements = np.unique(index)
        sectors = len(np.unique(addresses // np.uint64(SECTOR)))
        size = len(elements) * region.itemsize
        self.accesses.append(
            Access(program, kind, region.name, elements, size, sectors, floating)
        )
        writer = self._writer(region, addresses)
        # Launches come one after the other, the programs of one in any order.
        others = (writer >= self._first) & (writer != program)
        if kind != "atomic" and others.any():
            does = "loads" if kind == "load" else "stores"
            self._remark(
                self.races,
                f"program {program} {does} element {self._where(region, index[others])} of {region.name}, which "
                f"program {int(writer[others][0])} of the same launch has stored",
            )
        if kind == "load":
            if not region.given and (writer < 0).any():
                missing = writer < 0
                self._remark(
                    self.unwritten,
                    f"program {program} loads element {self._where(region, index[missing])} of {region.name}, "
                    "which no program has stored",
                )
        else:
            memory, itemsize = region.storage
            if region.storage not in self._writers:
                size = region.tensor.untyped_storage().nbytes() // itemsize
                # Zeros take no memory until they are written to: nobody is 0, program n is n + 1.
                self._writers[region.storage] = np.zeros(size, dtype=np.int32)
            places = (addresses.astype(np.int64) - memory) // itemsize
            self._writers[region.storage][places] = program + 1

    def _writer(self, region: _Region, addresses: Any) -> Any:
        """The program that stored at each address last, -1 for nobody."""
        memory, itemsize = region.storage
        if region.storage not in self._writers:
            return np.full(addresses.shape, -1)
        places = (addresses.astype(np.int64) - memory) // itemsize
        return self._writers[region.storage][places].astype(np.int64) - 1

    @staticmethod
    def _where(region: _Region, index: Any) -> list[int]:
        return [int(i) for i in np.unravel_index(int(index[0]), region.shape or (1,))]

    @staticmethod
    def _remark(notes: list[str], text: str) -> None:
        if len(notes) < MOST_NOTES:
            notes.append(text)

    def _refuse(
        self, kind: str, addresses: Any, regions: list[_Region], program: int, at: Any
    ) -> None:
        does = {"load": "loads", "store": "stores", "atomic": "updates"}[kind]
        count = f"{addresses.size:,} element{'s' * (addresses.size != 1)}"
        far = min((r.how_far(addresses) for r in regions), default=(0, "no tensor"))[1]
        where = ", ".join(str(n) for n in at)
        self.outside = f"program {program} (grid position {where}) {does} {count} out of bounds: {far}"
        raise OutOfBoundsError(self.outside)


# What Triton's compiler knows of Python's own names, and what it treats as a part of something else.
BUILTINS = {
    "len", "list", "range", "float", "int", "isinstance", "getattr", "hasattr", "print", "min", "max",
}  # fmt: skip
PARTS = (
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.comprehension, ast.withitem,
    ast.FormattedValue, ast.Starred, ast.arguments, ast.arg,
)  # fmt: skip


def _refused(function: Any) -> list[str]:
    """What of a kernel the interpreter runs as Python, and a compiler would refuse."""
    from triton.compiler.code_generator import CodeGenerator

    if (function.__module__ or "").startswith("triton."):
        return []
    found = [
        f"{function.__name__} uses {name}, {reason}"
        for name in _globals_of(function.__code__)
        if (reason := _foreign(name, function.__globals__))
    ]
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return found  # made by exec
    assert isinstance(tree, ast.FunctionDef)
    for node in [n for statement in tree.body for n in ast.walk(statement)]:
        known = isinstance(node, PARTS) or hasattr(
            CodeGenerator, f"visit_{type(node).__name__}"
        )
        if not known or (isinstance(node, ast.Attribute) and node.attr == "handle"):
            text = ast.unparse(node).splitlines()[0][:60]
            found.append(
                f"{function.__name__} says `{text}`, which Triton's compiler does not know"
            )
    return found


def _globals_of(code: CodeType) -> list[str]:
    """The names that are looked up outside of a function, each once."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return [*dict.fromkeys(names + [name for part in inner for name in _globals_of(part)])]  # fmt: skip


def _foreign(name: str, names: dict[str, Any]) -> str:
    """Why a compiler would refuse a name from outside of a kernel, "" where it would not."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITCallable

    if name in BUILTINS:
        return ""
    if name not in names:
        # Else it is unknown, and the kernel's own error.
        known = hasattr(builtins, name)
        return "which is Python's: a kernel has only what is in tl" if known else ""
    value = names[name]
    if isinstance(value, ModuleType):
        foreign = value.__name__.split(".")[0] in ("torch", "numpy")
        return "which is not there on a GPU: a kernel has only what is in tl" if foreign else ""  # fmt: skip
    kernels = (InterpretedFunction, JITCallable, tl.constexpr, tl.dtype)
    module = getattr(value, "__module__", None)
    if (
        isinstance(value, kernels)
        or getattr(value, "__triton_builtin__", False)
        or (isinstance(module, str) and module.startswith("triton."))
    ):
        return ""
    if callable(value):
        return "a function without @triton.jit"
    return "a global of Python, which Triton's compiler refuses: hand it over as an argument, or make it a tl.constexpr"


def _is_descriptor(value: object) -> bool:
    return type(value).__name__ == "TensorDescriptor"


def _poison(shape: Any, dtype: Any, tl_dtype: Any) -> Any:
    """What a lane without `other` holds: NaN, or the largest integer."""
    name = str(tl_dtype)
    if name == "bf16":
        return np.full(shape, 0x7FC0, dtype=dtype)
    if name.startswith("fp8"):
        return np.full(shape, 0x7F, dtype=dtype)
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype=dtype)
    if dtype.kind in "iu" and not name.startswith("pointer"):
        return np.full(shape, np.iinfo(dtype).max, dtype=dtype)
    return np.zeros(shape, dtype=dtype)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module, a class or an object, replaced and put back as it was."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


_active = False


@contextmanager
def trace(
    tensors: Mapping[str, Any] | None = None, hide: bool = False
) -> Iterator[Trace]:
    """Watch every kernel that is launched inside.

    tensors: the CPU tensors that kernels may read, by name; with it, a load of anything that is neither one of these
    nor stored by a program before is noted in `unwritten`. Other tensors that a kernel is given are named after its
    parameters.

    hide: the floating-point ones among them hold their values only while a kernel runs, and NaN between launches: what
    is not computed by a kernel then comes out as NaN.

    Raises OutOfBoundsError at the first access outside, RuntimeError where kernels are not interpreted.
    """
    global _active
    import triton
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "kernels run compiled here: set TRITON_INTERPRET=1 before triton is first imported"
        )
    if _active:
        raise RuntimeError("a trace inside a trace")
    seen = Trace(tensors)
    builder = interpreter.interpreter_builder
    handle = interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, dot = (
        builder.create_atomic_rmw,
        builder.create_atomic_cas,
        builder.create_dot,
    )
    set_grid, convert = builder.set_grid_dim, interpreter._implicit_cvt
    rewrite = interpreter.InterpretedFunction.rewrite
    run, semantic = interpreter.GridExecutor.__call__, interpreter.interpreter_semantic
    load_any, patch_language = semantic.load, interpreter._patch_lang

    def noted(kind: str, pointers: Any, mask: Any) -> Any:
        element = pointers.get_element_ty()
        width = max(1, element.primitive_bitwidth // 8)
        plain = seen.access(
            kind,
            pointers.data,
            mask,
            width,
            builder.grid_idx,
            bool(element.is_floating()),
        )
        return handle(plain, pointers.dtype)

    has_other = False

    def semantic_load(pointer: Any, mask: Any, other: Any, *rest: Any) -> Any:
        # The interpreter forgets a scalar `other` that is 0.
        nonlocal has_other
        has_other = other is not None
        return load_any(pointer, mask, other, *rest)

    def masked_load(pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:  # fmt: skip
        lanes = np.asarray(mask.data)
        plain = noted("load", pointers, lanes)
        if other is None and not has_other and not lanes.all():
            element = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            other = handle(_poison(plain.data.shape, dtype, element), element)
        return load(plain, mask, other, *rest, **named)

    def masked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        plain = noted("store", pointers, np.asarray(mask.data))
        return store(plain, value, mask, *rest)

    def atomic_rmw(op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        plain = noted("atomic", pointer, np.asarray(mask.data))
        return rmw(op, plain, value, mask, *rest)

    def atomic_cas(pointer: Any, *rest: Any) -> Any:
        return cas(noted("atomic", pointer, np.True_), *rest)

    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        m, k = a.data.shape[-2:]
        seen.dots.add((m, b.data.shape[-1], k))
        return dot(a, b, *rest)

    hidden: list[tuple[Any, Any]] = []
    shown = False

    def set_grid_dim(*grid: int) -> None:
        # Only now: a function that computes the grid is no kernel.
        nonlocal shown
        seen.launch((int(grid[0]), int(grid[1]), int(grid[2])))
        set_grid(*grid)
        shown = True
        for tensor, values in hidden:
            tensor.copy_(values)

    def rewritten(function: Any) -> Any:
        seen.kernel(function.fn)
        return rewrite(function)

    def implicit_cvt(argument: Any) -> Any:
        value = convert(argument)
        if hasattr(argument, "untyped_storage"):
            value.handle.data = value.handle.data | (
                np.uint64(seen.tag(argument)) << TAG_SHIFT
            )
        return value

    def total(reduction: Any, value: Any) -> Any:
        # The interpreter adds from the first to the last, a GPU in no order that it promises.
        data = value.handle.data
        if data.dtype.kind == "f":
            data = np.flip(data, axis=reduction.axis)
        added = np.sum(data, axis=reduction.axis, keepdims=reduction.keep_dims)
        return reduction.to_tensor(added, value.dtype)

    patched: set[int] = set()

    def patch_lang(function: Any) -> Any:
        # The interpreter does this anew, in milliseconds, for every call of tl.sum or tl.zeros.
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch_language(function)

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal shown
        patched.clear()
        shown = False
        accepted = inspect.getfullargspec(executor.fn).args
        chosen = {k: v for k, v in kwargs.items() if k in accepted}
        try:
            arguments = inspect.getcallargs(executor.fn, *args, **chosen)
        except TypeError:
            arguments = {}  # the launch itself will say so
        for name, value in arguments.items():
            seen.argument(name, value)
        try:
            return run(executor, *args, **kwargs)
        finally:
            if shown:
                seen.launched()
                for tensor, values in hidden:
                    values.copy_(tensor)
                    tensor.fill_(np.nan)

    patches = {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_atomic_rmw": atomic_rmw,
        "create_atomic_cas": atomic_cas,
        "create_dot": create_dot,
        "set_grid_dim": set_grid_dim,
    }
    if hide:
        floats = [t for t in (tensors or {}).values() if t.is_floating_point()]
        hidden += [(tensor, tensor.clone()) for tensor in floats]
    _active = True
    try:
        with ExitStack() as stack:
            for tensor, values in hidden:
                tensor.fill_(np.nan)
                stack.callback(tensor.copy_, values)
            for name, function in patches.items():
                stack.enter_context(_replaced(builder, name, function))
            stack.enter_context(_replaced(semantic, "load", semantic_load))
            stack.enter_context(_replaced(interpreter, "_patch_lang", patch_lang))
            stack.enter_context(_replaced(interpreter, "_implicit_cvt", implicit_cvt))
            interpreted = interpreter.InterpretedFunction
            stack.enter_context(_replaced(interpreted, "rewrite", rewritten))
            stack.enter_context(_replaced(interpreter.ReduceOps, "sum", total))
            stack.enter_context(_replaced(interpreter.GridExecutor, "__call__", launch))
            yield seen
    except InterpreterError as error:
        # What went wrong, in place of the interpreter's account of it.
        cause: BaseException = error
        while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    finally:
        _active = False
    if seen.outside:  # and somebody has swallowed the error
        raise OutOfBoundsError(seen.outside)
