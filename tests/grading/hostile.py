"""Submissions that attack the judge, each with the fair result written down beforehand.

A case starts from the worked solution of an exercise, which earns full marks, and does harm in one place: whatever it
does not spoil must still count. `lost` names the questions that fairly earn nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def solution(number: str) -> list[tuple[str, str]]:
    """(tag, source) of the code cells of a worked solution; the tag is the question, or empty."""
    (path,) = (ROOT / "solutions").glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    found = []
    for cell in cells:
        if cell["cell_type"] == "code":
            tags = [t for t in cell["metadata"].get("tags", ()) if t.startswith(number)]
            found.append((tags[0] if tags else "", "".join(cell["source"])))
    return found[:-1]  # the last one asserts full marks


@dataclass(frozen=True)
class Case:
    name: str
    exercise: str = "01"
    first: str = ""  # a cell before all others
    last: str = ""  # a cell after all others
    answers: dict[str, str] = field(default_factory=dict)  # in place of the worked ones
    lost: tuple[str, ...] = ()
    review: tuple[str, ...] = ()  # questions that a person has to look at
    status: str = "graded"
    says: str = ""  # in some reason

    @property
    def thorough(self) -> bool:
        """Slow, or much like another one of its kind: not in every run."""
        return self.name in THOROUGH

    def cells(self) -> list[str]:
        cells = [
            self.answers.get(tag, source) for tag, source in solution(self.exercise)
        ]
        return [c for c in [self.first, *cells, self.last] if c]


def _spoilt(
    name: str, body: str, says: str = "", review: bool = False, first: str = ""
) -> Case:
    """01.6 does harm, and the rest is right."""
    code = f"def active_at(total, active, experts, k, new_k):\n    {body}\n"
    return Case(
        name,
        first=first,
        answers={"01.6": code},
        lost=("01.6",),
        review=("01.6",) if review else (),
        status="needs-review" if review else "graded",
        says=says,
    )


def _tensor(name: str, body: str, says: str = "", lost: bool = True) -> Case:
    """02.1 returns something odd; `right` is the right answer."""
    code = (
        "def right(logits, k):\n"
        "    kept = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]\n"
        "    w = logits.gather(1, kept).softmax(-1)\n"
        "    return torch.zeros_like(logits).scatter(1, kept, w)\n"
        f"def gate_matrix(logits, k):\n    {body}\n"
    )
    return Case(
        name, "02", answers={"02.1": code}, lost=("02.1",) if lost else (), says=says
    )


THOROUGH = {
    "sleep in an answer",
    "endless loop in __del__",
    "stops itself",
    "an interrupt in an answer",
    "abort",
    "os._exit at top level",
    "patched builtins",
    "patched checks",
    "a message of 2^60 bytes",
    "closes everything",
    "the package's answer through sys.modules",
    "the package's answer through inspect",
    "a deep value",
    "a text of 100 MB",
    "a value whose repr fails",
    "a sparse tensor",
    "a tensor of 10^10 entries",
    "a recipe that never comes",
    "a recipe that patches what trains it",
    "a recipe of classes that lie",
}

RIGHT = "return active + (new_k - k) * (total - active) // (experts - k)"
WRONG = "return 1"
ALL_01 = tuple(f"01.{n}" for n in range(1, 8))


def _recipe(name: str, body: str, first: str = "", **more: Any) -> Case:
    """07.5 returns something odd."""
    return Case(name, "07", first=first, answers={"07.5": f"def recipe():\n    {body}\n"}, **more)  # fmt: skip


CASES = [
    # A design that the judge itself trains
    _recipe("a recipe that never comes", "while True: pass", lost=("07.5",), review=("07.5",), status="needs-review",
            says="ran longer"),
    _recipe("a recipe of classes that lie", "class D(dict): pass\n    return D(width=32)", lost=("07.5",)),
    Case("a recipe that patches what trains it", "07",
         first="import sys, torch\ntorch.manual_seed = lambda s: None\n"
               "for m in list(sys.modules.values()):\n"
               "    if 'capstone' in getattr(m, '__name__', ''): m.train = m.train_apart = m.BAR = None"),
    # Time
    _spoilt("endless loop in an answer", "while True: pass", "ran longer", review=True),
    _spoilt("sleep in an answer", "import time; time.sleep(10**6)", "ran longer", review=True),
    Case("endless loop at top level", last="while True: pass", status="needs-review", says="ran longer"),
    Case(
        "endless loop in __del__",
        last="class X:\n    def __del__(self):\n        while True: pass\nX()",
        status="needs-review",
        says="ran longer",
    ),
    Case("endless loop in an exit handler", last="import atexit\ndef f():\n    while True: pass\natexit.register(f)"),
    Case("stops itself", last="import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", status="needs-review"),
    Case("ignores signals", first="import signal\nfor s in (2, 15, 1, 3): signal.signal(s, signal.SIG_IGN)"),
    # Memory
    _spoilt("memory by touch", "return len(b'x' * (4 * 2**30))", "memory", review=True),
    _spoilt("more memory than an address space", "return bytearray(2**40)", "MemoryError"),
    Case(
        "memory in many processes",
        last="import os, time\nfor _ in range(6):\n    if not os.fork():\n        x = b'x' * 2**30\n        time.sleep(60)\n"
        "time.sleep(60)",
        status="needs-review",
    ),
    # Ends itself
    _spoilt("os._exit in an answer", "import os; os._exit(0)", "ended the process", review=True),
    _spoilt("sys.exit in an answer", "import sys; sys.exit(0)", "SystemExit"),
    _spoilt("an interrupt in an answer", "raise KeyboardInterrupt", "KeyboardInterrupt"),
    _spoilt("segmentation fault", "import ctypes; ctypes.string_at(0)", review=True),
    _spoilt("abort", "import os; os.abort()", review=True),
    Case("os._exit at top level", last="import os; os._exit(0)", status="needs-review", says="ended the process"),
    Case("signals to the parent", last="import os\nos.kill(os.getppid(), 9)"),
    Case("signals to all", last="import os\nos.kill(-1, 9)", status="graded"),
    # Floods
    Case("threads", last="import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"),
    Case("200 MB of output", last="import sys\nfor _ in range(200): print('x' * 2**20); sys.stderr.write('x' * 2**20)"),
    Case("fills the disk", last="for i in range(500):\n    open(f'/tmp/{i}', 'wb').write(b'x' * 2**20)"),
    _spoilt("endless recursion", "return active_at(total, active, experts, k, new_k)", "RecursionError"),
    # Tampering: a wrong answer stays wrong
    _spoilt("patched builtins", WRONG, first="import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True"),
    _spoilt("patched torch", WRONG, first="import torch\ntorch.allclose = torch.equal = lambda *a, **k: True\ntorch.Tensor.__eq__ = lambda a, b: True"),
    _spoilt("patched checks", WRONG, first="import sys, types\nm = sys.modules['moe_course.grading']\nm.check = lambda *a: None\nm.grade = lambda *a: 99"),
    _spoilt(
        "patched protocol",
        WRONG,
        first="import sys\nw = sys.modules['moe_judge.wire']\nold = w.pack\n"
        "w.pack = lambda m, b: old(m | {'points': 99, 'status': 'passed', 'changed': False}, b)",
    ),
    _spoilt(
        "forged replies",
        "import os, json, struct\n"
        "    for fd in range(3, 30):\n"
        "        try:\n"
        "            for n in range(1, 40):\n"
        "                m = json.dumps({'id': n, 'value': ['int', '0x1'], 'passed': True}).encode()\n"
        "                os.write(fd, struct.pack('>QI', len(m), len(m)) + m)\n"
        "        except OSError: pass\n"
        "    return 1",
        review=True,
    ),
    _spoilt("a message of 2^60 bytes", "import os\n    for fd in range(3, 30):\n        try: os.write(fd, b'\\x10' + bytes(11))\n        except OSError: pass\n    return 1", review=True),
    _spoilt("closes everything", "import os; os.closerange(0, 256); return 1", review=True),
    _spoilt("an answer that lies about equality", "return type('L', (int,), {'__eq__': lambda a, b: True, '__hash__': int.__hash__})(1)"),
    _spoilt("an object that lies about its class", "return type('L', (), {'__class__': property(lambda s: int), '__eq__': lambda a, b: True})()"),
    _spoilt("the package's answer", "from moe_course.specs import ModelSpec; return 1", "ModuleNotFoundError"),
    _spoilt("the package's answer through sys.modules", "import sys; return sys.modules['moe_course'].specs", "no attribute"),
    _spoilt("the package's answer through inspect", "import inspect, moe_course; return len(inspect.getsource(moe_course))"),
    _spoilt(
        "the package's source, found where it is installed",
        "import glob, sys\n"
        "    found = [f for p in sys.path for f in glob.glob(p + '/moe_course/**/*.py', recursive=True)]\n"
        "    found += [line for p in sys.path for f in glob.glob(p + '/*moe_course*') for line in glob.glob(f + '/*.py')]\n"
        "    exec(open(found[0]).read()); return 1",
        "IndexError",
    ),
    _spoilt(
        "looks for the checks on disk",
        "import os, re\n"
        "    for folder, _, files in os.walk('/'):\n"
        "        if folder.startswith(('/proc', '/sys', '/usr/lib', '/usr/share')) or 'site-packages' in folder: continue\n"
        "        for f in files:\n"
        "            if f in ('01_concepts.py', 'core.py', '01_concepts.ipynb'): return 10**6\n"
        "    return 1",
    ),
    Case("writes outside", last="for p in ('/judge/x', '/x', '/usr/x', '/etc/x'):\n    open(p, 'w')"),
    _spoilt("asks the network", "import urllib.request; return int(urllib.request.urlopen('http://1.1.1.1', timeout=2).read())"),
    Case("leaves processes behind", last="import subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)"),
    Case("reads from the keyboard", last="input()"),
    # Values
    _spoilt("a deep value", "x = []\n    for _ in range(10**5): x = [x]\n    return x", "nested"),
    _spoilt("a cyclic value", "x = []; x.append(x); return x", "nested"),
    _spoilt("a number of a million digits", "return 10**(10**6)"),
    _spoilt("a text of 100 MB", "return 'x' * 10**8"),
    _spoilt("an error whose text fails", "class E(Exception):\n        def __str__(self): raise E\n    raise E"),
    _spoilt("a value whose repr fails", "class V:\n        def __repr__(self): raise ValueError\n    return V()"),
    Case(
        "an object in place of a function",
        answers={"01.6": f"class A:\n    def __call__(self, total, active, experts, k, new_k):\n        {RIGHT}\nactive_at = A()"},
    ),
    Case("a number in place of a function", answers={"01.6": "active_at = 3"}, lost=("01.6",), says="no function but int"),
    Case("a deleted answer", answers={"01.6": ""}, lost=("01.6",), says="missing"),
    Case("a cell that does not parse", answers={"01.6": "def active_at(:"}, lost=("01.6",), says="SyntaxError"),
    Case("a duplicated answer: the last one counts", last=f"def active_at(total, active, experts, k, new_k):\n    {WRONG}", lost=("01.6",)),
    Case("deletes all names", last="for n in list(globals()):\n    if not n.startswith('__'): del globals()[n]", lost=ALL_01, says="missing"),
    # Tensors
    _tensor("a tensor of other strides", "return right(logits, k).T.contiguous().T", lost=False),
    _tensor("a tensor that requires a gradient", "return right(logits, k).requires_grad_()", lost=False),
    _tensor("a tensor of NaN", "return right(logits, k) * float('nan')"),
    _tensor("a sparse tensor", "return right(logits, k).to_sparse()"),
    _tensor("a meta tensor", "return right(logits, k).to('meta')"),
    _tensor("a tensor of 10^10 entries", "return torch.zeros(1, 1).expand(10**5, 10**5)"),
    _tensor("a tensor that lies", "return type('L', (torch.Tensor,), {'__eq__': lambda a, b: torch.ones(())})(right(logits, k))"),
    _tensor("a changed argument", "y = right(logits, k); logits.zero_(); return y", "changed its arguments"),
    _tensor("a changed argument, denied", "import sys; sys.modules['moe_judge.worker'] = None\n    logits.zero_(); return right(logits, k)"),
]  # fmt: skip
