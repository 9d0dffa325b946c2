"""Reads binaries: registers and spills, memory instructions, and which operand is accessed how wide.

Instructions are counted in the machine code (SASS, AMD's assembly). Which kernel argument an access belongs
to is gone by then, so the widths are read one step earlier (PTX, LLVM IR): from the address back through the
definitions of its registers to the pointer it started from. Neither assembler splits or joins accesses of 16
bytes.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from triton import knobs

from audiomae_kernels.inspect.rehearsal import Recorded
from audiomae_kernels.inspect.targets import Target


@dataclass
class Binary:
    """What one binary says of itself."""

    registers: int  # of a thread; vector and accumulation registers on AMD
    shared: int  # bytes of a block
    spills: int  # instructions (NVIDIA) or registers (AMD) that go to local memory
    local: int  # bytes of a thread's stack
    atomics: int
    matrix: str  # the most frequent matrix instruction, or ""
    products: int  # matrix instructions of any shape
    reduced: int  # matrix instructions that round float32 operands to TF32
    narrow: int  # address computations that multiply a run-time argument in 32 bits
    loads: dict[str, list[int]] = field(default_factory=dict)  # operand -> widths in bits that occur
    stores: dict[str, list[int]] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)  # global memory and matrix instructions

    as_dict = asdict


def read(recorded: Recorded, target: Target) -> Binary:
    if target.is_amd:
        binary = _read_amdgcn(recorded)
        binary.loads, binary.stores = _widths(_llvm_accesses(recorded.files["llir"].read_text()), recorded)
    else:
        binary = _read_cubin(recorded)
        binary.loads, binary.stores = _widths(_ptx_accesses(recorded.files["ptx"].read_text()), recorded)
    binary.narrow = narrow_offsets(recorded.files["ttir"].read_text())
    return binary


# --- machine code ---------------------------------------------------------------------------------

_SASS_MEMORY = ("LDG", "STG", "LDGSTS", "LDL", "STL", "UTMALDG", "UTMASTG", "UBLKCP")
_SASS_ATOMIC = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS", "UTMAREDG", "UTMAREDS")
_SASS_BITWISE = ("ATOMS.AND", "ATOMS.OR")  # on Blackwell: allocation of tensor memory; no order shows in them
_SASS_MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "IMMA", "DMMA", "OMMA")


def _read_cubin(recorded: Recorded) -> Binary:
    path = str(recorded.files["cubin"])
    usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path)
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    sass = _run(knobs.nvidia.nvdisasm.path, path)
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass))

    def count(*names: str) -> int:
        return sum(number for opcode, number in opcodes.items() if opcode.split(".")[0] in names)

    kept = (*_SASS_MEMORY, *_SASS_ATOMIC, *_SASS_MATRIX)
    matrix = [opcode for opcode in opcodes if opcode.split(".")[0] in _SASS_MATRIX]
    return Binary(
        registers=resources["REG"],
        shared=recorded.shared,
        spills=count("LDL", "STL"),
        local=resources["STACK"] + resources["LOCAL"],
        atomics=count(*_SASS_ATOMIC) - sum(opcodes[opcode] for opcode in _SASS_BITWISE),
        matrix=max(matrix, key=opcodes.__getitem__, default=""),
        products=sum(opcodes[opcode] for opcode in matrix),
        reduced=sum(opcodes[opcode] for opcode in matrix if "TF32" in opcode),
        narrow=0,
        instructions=_sorted({op: n for op, n in opcodes.items() if op.split(".")[0] in kept}),
    )


_GCN_KEPT = re.compile(
    r"^\s+((?:global|buffer|flat|scratch)_(?:load|store|atomic)\w*"
    r"|ds_(?:add|sub|max|min|cmpst|rtn)\w*|v_mfma\w+)"
)


def _read_amdgcn(recorded: Recorded) -> Binary:
    text = recorded.files["amdgcn"].read_text()

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    opcodes = Counter(match[1] for line in text.splitlines() if (match := _GCN_KEPT.match(line)))
    matrix = [opcode for opcode in opcodes if opcode.startswith("v_mfma")]
    atomic = [opcode for opcode in opcodes if "atomic" in opcode or opcode.startswith("ds_")]
    return Binary(
        registers=metadata("vgpr_count"),
        shared=recorded.shared,
        spills=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        local=metadata("private_segment_fixed_size"),
        atomics=sum(opcodes[opcode] for opcode in atomic),
        matrix=max(matrix, key=opcodes.__getitem__, default=""),
        products=sum(opcodes[opcode] for opcode in matrix),
        reduced=sum(opcodes[opcode] for opcode in matrix if "xf32" in opcode),
        narrow=0,
        instructions=_sorted(opcodes),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _sorted(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


# --- widths by operand ----------------------------------------------------------------------------


@dataclass
class _Accesses:
    """Definitions, register -> registers it is computed from, and the accesses with their address."""

    sources: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    parameters: dict[str, int] = field(default_factory=dict)  # register -> position of a parameter
    found: list[tuple[str, str, int]] = field(default_factory=list)  # "load" or "store", address, bits


def _widths(accesses: _Accesses, recorded: Recorded) -> tuple[dict, dict]:
    widths = {"load": defaultdict(set), "store": defaultdict(set)}
    for kind, address, bits in accesses.found:
        roots = set()
        for register in _reach(address, accesses.sources):
            name = recorded.pointers.get(accesses.parameters.get(register))
            if name is not None:
                roots.add(name.removesuffix("_ptr"))
        widths[kind]["|".join(sorted(roots)) or "?"].add(bits)
    return tuple({name: sorted(found) for name, found in widths[kind].items()} for kind in ("load", "store"))


def _reach(start: str, sources: dict[str, set[str]]) -> Iterable[str]:
    seen, todo = {start}, [start]
    while todo:
        for register in sources.get(todo.pop(), ()):
            if register not in seen:
                seen.add(register)
                todo.append(register)
    return seen


# Addresses too take the way through shared memory when a tensor changes its layout. Whatever comes out of
# there may be whatever went in: what is no address has no pointer among its sources.
_SHARED = "shared memory"

_PTX_LINE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);\s*$")
_PTX_GLOBAL = re.compile(r"^(ld|st)\.(?:\w+\.)*?global(?:[.:]+\w+)*?(?:\.v(\d))?\.[bufs](\d+)$")


def _ptx_accesses(text: str) -> _Accesses:
    accesses = _Accesses()
    for line in text.splitlines():
        if not (match := _PTX_LINE.match(line)):
            continue
        opcode, operands = match.groups()
        registers = re.findall(r"%\w+", operands)
        address = re.search(r"\[\s*(%\w+)", operands)
        if access := _PTX_GLOBAL.match(opcode):
            bits = int(access[2] or 1) * int(access[3])
            accesses.found.append(({"ld": "load", "st": "store"}[access[1]], address[1], bits))
        elif opcode.startswith("cp.async") and "global" in opcode:
            _, source = re.findall(r"\[\s*(%\w+)", operands)[:2]
            size = int(re.search(r"\],\s*(0x[0-9a-f]+|\d+)", operands[operands.rindex("[") :])[1], 0)
            accesses.found.append(("load", source, 8 * size))
        elif opcode.startswith("ld.param"):
            accesses.parameters[registers[0]] = int(re.search(r"_param_(\d+)", operands)[1])
        elif opcode.startswith("st.shared"):
            accesses.sources[_SHARED].update(registers[1:])
        elif first := re.match(r"\{[^}]*\}|%\w+", operands):  # the result: a register, or several in braces
            results = re.findall(r"%\w+", first[0])
            used = [_SHARED] if opcode.startswith("ld.shared") else registers[len(results) :]
            for result in results:
                accesses.sources[result].update(used)
    return accesses


_LLVM_BUFFER = r"@llvm\.amdgcn\.raw\.ptr\.buffer\."
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}


def _llvm_accesses(text: str) -> _Accesses:
    accesses = _Accesses()
    define = re.search(r"^define amdgpu_kernel .*$", text, re.MULTILINE)[0]
    for i, name in enumerate(re.findall(r"%\w+", define)):
        accesses.parameters[name] = i
    for line in text.splitlines():
        body = line.split(", !")[0]
        result = re.match(r"\s+(%[\w.]+) = ", body)
        if found := re.search(r"= load (.+?), ptr addrspace\(1\) (%[\w.]+)", body):
            accesses.found.append(("load", found[2], _llvm_bits(found[1])))
        elif found := re.search(r"\bstore (.+?) %?[\w.<>]+, ptr addrspace\(1\) (%[\w.]+)", body):
            accesses.found.append(("store", found[2], _llvm_bits(found[1])))
        elif found := re.search(rf"call (\S.*?) {_LLVM_BUFFER}load\S*?\(ptr addrspace\(8\) (%[\w.]+)", body):
            accesses.found.append(("load", found[2], _llvm_bits(found[1])))
        elif found := re.search(
            rf"{_LLVM_BUFFER}store\S*?\((.+?) %[\w.]+, ptr addrspace\(8\) (%[\w.]+)", body
        ):
            accesses.found.append(("store", found[2], _llvm_bits(found[1])))
        elif " store " in body and "addrspace(3)" in body:
            accesses.sources[_SHARED].update(re.findall(r"%[\w.]+", body))
        elif result and re.search(r"= load .*addrspace\(3\)", body):
            accesses.sources[result[1]].add(_SHARED)
        elif result:
            accesses.sources[result[1]].update(re.findall(r"%[\w.]+", body[result.end() :]))
    return accesses


def _llvm_bits(ty: str) -> int:
    vector = re.fullmatch(r"<(\d+) x (\w+)>", ty)
    count, scalar = (int(vector[1]), vector[2]) if vector else (1, ty)
    return count * (int(scalar[1:]) if scalar[0] == "i" else _BITS[scalar])


# --- offsets --------------------------------------------------------------------------------------


def narrow_offsets(ttir: str) -> int:
    """How many 32-bit products with a run-time argument (strides, sizes) an address is computed from.

    The argument has to be a factor itself, or a factor's splat. A factor computed from an argument is not
    counted: ``i % cdiv(T, BLOCK) * BLOCK``, a tile's place in its clip, has one as well and stays small.
    """
    sources, products, addresses, arguments = defaultdict(set), set(), set(), set()
    for line in ttir.splitlines():
        if "tt.func" in line:
            arguments |= set(re.findall(r"(%\w+): i(?:32|64)", line))
            continue
        body = re.sub(r"loc\(.*", "", line)
        for inner, initial in re.findall(r"(%\w+) = (%[\w#]+)(?=[,)])", body):
            sources[inner].add(initial)
        if not (match := re.match(r"\s+(%\w+)(?::\d+)? = (.*)", body)):
            continue
        result, rest = match.groups()
        operands = re.findall(r"%\w+", rest)
        if "tt.load" in rest:
            continue
        sources[result].update(operands)
        if rest.startswith("arith.muli") and re.search(r": (?:i32|tensor<[\dx]+xi32)", rest):
            products.add(result)
        if rest.startswith("tt.addptr"):
            addresses.add(operands[1])
    reached = set().union(*(_reach(address, sources) for address in addresses)) if addresses else set()
    return sum(
        any(source in arguments or _is_splat_of(source, sources, arguments) for source in sources[product])
        for product in products & reached
    )


def _is_splat_of(register, sources, arguments) -> bool:
    (only,) = sources[register] if len(sources[register]) == 1 else (None,)
    return only in arguments
