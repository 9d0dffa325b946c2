"""The native CPU library: its ops bit for bit against plain definitions, in every ISA tier."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from audiomae_kernels import _native

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "kernels" / "csrc"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

needs_library = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")


def gather(spectrogram, ids, patch, stride):
    return torch.ops.audiomae_native.patch_gather(spectrogram, ids, *patch, *stride)


def gather_slow(spectrogram, ids, patch, stride):
    """The definition, value by value: out[i, k, r * pf + c] = spectrogram[i // m, t + r, f + c]."""
    (B, T, F), (rows, K), (pt, pf), (st, sf) = spectrogram.shape, ids.shape, patch, stride
    grid_t, grid_f = (T - pt) // st + 1, (F - pf) // sf + 1
    out = torch.zeros(rows, K, pt * pf, dtype=spectrogram.dtype)
    for i in range(rows):
        for k in range(K):
            token = int(ids[i, k])
            if 0 <= token < grid_t * grid_f:
                t, f = token // grid_f * st, token % grid_f * sf
                for r in range(pt):
                    for c in range(pf):
                        out[i, k, r * pf + c] = spectrogram[i // (rows // B), t + r, f + c]
    return out


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.is_contiguous()
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def random_bits(*shape, dtype=torch.float32, seed=0):
    """Every bit pattern, NaNs with payloads included: a copy must keep them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    return (
        torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)
    )


def random_ids(rows, kept, tokens, seed=0):
    return torch.randint(0, tokens, (rows, kept), generator=torch.Generator().manual_seed(seed))


def tokens_of(shape, patch, stride):
    return ((shape[1] - patch[0]) // stride[0] + 1) * ((shape[2] - patch[1]) // stride[1] + 1)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, patch, stride",
    [
        ((2, 32, 48), (16, 16), (16, 16)),
        ((2, 36, 36), (16, 16), (10, 10)),  # overlapping, as AST and SSAST
        ((1, 48, 32), (32, 16), (16, 16)),
        ((2, 12, 20), (2, 20), (2, 20)),  # frame tokens: a patch is one run of bytes
        ((2, 13, 11), (3, 5), (2, 4)),  # odd sizes, rest at both ends
        ((1, 7, 5), (7, 5), (1, 1)),
        ((1, 4, 4), (1, 1), (1, 1)),
        ((1, 9, 9), (2, 2), (5, 6)),  # gaps between patches
    ],
)
def test_patch_gather(shape, patch, stride, dtype):
    spectrogram = random_bits(*shape, dtype=dtype)
    ids = random_ids(shape[0], 7, tokens_of(shape, patch, stride))
    assert_same_bits(gather(spectrogram, ids, patch, stride), gather_slow(spectrogram, ids, patch, stride))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded batch", "expanded mel", "misaligned"])
def test_patch_gather_strides(layout, dtype):
    patch, stride, size = (4, 3), (3, 2), torch.empty(0, dtype=dtype).element_size()
    spectrogram = {
        "transposed": lambda: random_bits(2, 11, 14, dtype=dtype).transpose(1, 2),
        "sliced": lambda: random_bits(4, 28, 33, dtype=dtype)[1::2, 1::2, 2::3],
        "expanded batch": lambda: random_bits(1, 14, 11, dtype=dtype).expand(2, 14, 11),
        "expanded mel": lambda: random_bits(2, 14, 1, dtype=dtype).expand(2, 14, 11),
        "misaligned": lambda: torch.frombuffer(
            bytearray(os.urandom(2 * 14 * 11 * size + 1)), dtype=dtype, offset=1
        ).view(2, 14, 11),
    }[layout]()
    ids = random_ids(12, 6, tokens_of(spectrogram.shape, patch, stride))[::3, ::2].T.contiguous().T
    assert not ids.is_contiguous()
    if layout == "misaligned":
        assert spectrogram.data_ptr() % size
    assert_same_bits(gather(spectrogram, ids, patch, stride), gather_slow(spectrogram, ids, patch, stride))


@needs_library
def test_patch_gather_several_masks():
    spectrogram = random_bits(2, 8, 8)
    ids = random_ids(6, 2, 4)
    out = gather(spectrogram, ids, (4, 4), (4, 4))
    assert_same_bits(out, gather_slow(spectrogram, ids, (4, 4), (4, 4)))
    assert_same_bits(out, gather(spectrogram.repeat_interleave(3, 0), ids, (4, 4), (4, 4)))


@needs_library
@pytest.mark.parametrize("batch, rows, kept", [(0, 0, 3), (2, 2, 0), (2, 0, 3), (0, 0, 0)])
def test_patch_gather_empty(batch, rows, kept):
    ids = torch.zeros(rows, kept, dtype=torch.int64)
    out = gather(torch.randn(batch, 8, 8), ids, (4, 2), (4, 2))
    assert out.shape == (rows, kept, 8)


@needs_library
def test_patch_gather_never_reads_out_of_range():
    patch, inside = (4, 4), torch.full((1, 8, 8), 1.0)
    memory = torch.full((3, 8, 8), float("nan"))  # NaN before and after the spectrogram
    memory[1:2] = inside
    ids = torch.tensor([[0, 3, -1, 4, 5, 2**31, -(2**31), 2**62, -(2**63), 2**63 - 1]])
    out = gather(memory[1:2], ids, patch, patch)
    assert torch.equal(out[0, :2], torch.ones(2, 16))
    assert_same_bits(out[:, 2:].contiguous(), torch.zeros(1, 8, 16))  # +0, to the bit


@needs_library
@pytest.mark.parametrize("stride", [2**60, 2**63 - 1])
def test_a_stride_past_the_end(stride):
    """There is one patch; in bytes such strides are no numbers, which the sanitized library would notice."""
    spectrogram = random_bits(1, 8, 6).as_strided((1, 8, 6), (2**62, 6, 1))  # one clip has no next one
    ids = torch.tensor([[0, 1]]).as_strided((1, 2), (2**62, 1))
    out = gather(spectrogram, ids, (4, 3), (stride, stride))
    assert_same_bits(out, gather_slow(spectrogram, ids, (4, 3), (stride, stride)))


@needs_library
def test_patch_gather_threads():
    spectrogram = random_bits(3, 256, 128)
    ids = random_ids(6, 100, 128)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gather(spectrogram, ids, (16, 16), (16, 16)))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@needs_library
@pytest.mark.parametrize(
    "spectrogram, ids, patch, stride, message",
    [
        (torch.zeros(8, 8), [[0]], (4, 4), (4, 4), r"\(batch, time, mel\), got \(8, 8\)"),
        (torch.zeros(1, 8, 8), [0], (4, 4), (4, 4), r"\(batch \* masks, kept\), got \(1,\)"),
        (torch.zeros(2, 8, 8), [[0]] * 3, (4, 4), (4, 4), r"for a batch of 2, got \(3, 1\)"),
        (torch.zeros(0, 8, 8), [[0]], (4, 4), (4, 4), r"for a batch of 0, got \(1, 1\)"),
        (torch.zeros(1, 8, 8), [[0]], (9, 4), (4, 4), r"fits the spectrogram's 8 x 8"),
        (torch.zeros(1, 8, 8), [[0]], (4, 4), (4, 0), r"stride of at least 1, got .* stride \(4, 0\)"),
        (torch.zeros(1, 8, 8), [[0]], (0, 4), (4, 4), r"got patch \(0, 4\)"),
        (torch.zeros(1, 8, 8, dtype=torch.int32), [[0]], (4, 4), (4, 4), "float16 spectrogram, got Int"),
        (torch.zeros(1, 8, 8), [[0.0]], (4, 4), (4, 4), "int64 ids, got Float"),
    ],
)
def test_patch_gather_refuses(spectrogram, ids, patch, stride, message):
    with pytest.raises(RuntimeError, match=message):
        gather(spectrogram, torch.tensor(ids), patch, stride)


@pytest.mark.skipif(not _native.LIBRARY.exists(), reason=_native.why_not() or "loaded")
def test_library_loads():
    """Where there is a library, the other tests may not skip."""
    assert _native.why_not() == ""


@needs_library
def test_ops_and_tiers():
    assert "patch_gather" in _native.ops()
    for name in _native.ops():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"audiomae_native::{name}", "CPU")
    tiers = _native.cpu_tiers()
    assert tiers[0][0] == "portable"
    assert sum(chosen for _, chosen, _ in tiers) == 1
    assert all(reason for _, _, reason in tiers)


def in_tier(tier, code):
    """Runs `code` in a process of its own with AUDIOMAE_CPU_TIER set."""
    path = os.pathsep.join([str(ROOT / "kernels"), str(Path(__file__).parent)])
    environment = {**os.environ, "AUDIOMAE_CPU_TIER": tier, "PYTHONPATH": path}
    code = f"from audiomae_kernels import _native\nfrom test_native import *\n{code}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_library
@pytest.mark.parametrize("tier", [name for name, _, reason in _native.cpu_tiers() if "lacks" not in reason])
def test_forced_tier(tier):
    """Every tier that this machine runs gives the definition's bits, on each of the copying loops."""
    out = in_tier(
        tier,
        """
print([name for name, chosen, _ in _native.cpu_tiers() if chosen])
for dtype in DTYPES:
    for patch, stride in [((16, 16), (10, 10)), ((2, 37), (2, 37)), ((3, 5), (2, 4))]:
        for spectrogram in random_bits(2, 29, 37, dtype=dtype), random_bits(2, 37, 29, dtype=dtype).mT:
            ids = random_ids(4, 3, tokens_of(spectrogram.shape, patch, stride))
            assert_same_bits(
                gather(spectrogram, ids, patch, stride), gather_slow(spectrogram, ids, patch, stride)
            )
test_patch_gather_threads()
""",
    )
    assert out.strip() == f"['{tier}']"


@needs_library
def test_unknown_tier():
    out = in_tier(
        "sse9",
        """
try:
    gather(torch.zeros(1, 8, 8), torch.zeros(1, 1, dtype=torch.int64), (4, 4), (4, 4))
except RuntimeError as error:
    print(error)
print(_native.cpu_tiers(), _native.why_not())
""",
    )
    said, listed = out.splitlines()
    assert said.startswith("AUDIOMAE_CPU_TIER=sse9 is not a tier of this build, which has portable")
    assert listed == f"[] {said}"


def compiler():
    return shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("There is no C++ compiler.")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="Only x86-64 has more than one tier.")
@pytest.mark.parametrize(
    "fake, lacks",
    [
        # CPUID's leaf 7 answers nothing, as on a CPU of before 2013.
        ("#define __get_cpuid_count(...) 0", "avx2"),
        # The operating system does not save the wide registers (OSXSAVE unset), whatever the CPU offers.
        ("#define __get_cpuid(leaf, a, b, c, d) (__get_cpuid(leaf, a, b, c, d), *(c) &= ~bit_OSXSAVE)",
         "256-bit registers saved by the operating system"),
    ],
    ids=["old CPU", "old operating system"],
)  # fmt: skip
def test_tier_that_the_machine_lacks(tmp_path, fake, lacks):
    (tmp_path / "cpuid.h").write_text(f"#include_next <cpuid.h>\n{fake}\n")
    (tmp_path / "main.cpp").write_text(
        '#include <cstdio>\n#include "tier.h"\n'
        "int main() { std::fputs(audiomae::describe_cpu_tiers().c_str(), stdout); }\n"
    )
    program = tmp_path / "tiers"
    flags = ["-std=c++17", "-DAUDIOMAE_ENTRY", "-DAUDIOMAE_X86_TIERS", f"-I{tmp_path}", f"-I{CSRC}"]
    flags += ["-DAUDIOMAE_AMX_TIER"] * (sys.platform == "linux")
    subprocess.run([compiler(), *flags, tmp_path / "main.cpp", CSRC / "tier.cpp", "-o", program], check=True)

    def tiers(forced):
        out = subprocess.run(
            [program], env={"AUDIOMAE_CPU_TIER": forced}, capture_output=True, text=True
        ).stdout
        return {name: (chosen, reason) for name, chosen, reason in (x.split("\t") for x in out.splitlines())}

    free = tiers("")
    assert free["portable"] == ("1", "the highest that this machine runs")
    for name in set(free) - {"portable"}:
        assert free[name][0] == "0" and "this machine lacks" in free[name][1] and lacks in free[name][1]
    forced = tiers("avx512")
    assert {chosen for chosen, _ in forced.values()} == {"0"}
    assert "AUDIOMAE_CPU_TIER=avx512 cannot run on this machine: it lacks" in forced["portable"][1]
    assert lacks in forced["portable"][1]


# What AT&T disassembly shows of an extension: registers, mnemonics.
NOT_IN_X86_64 = (  # SSE3 to SSE4.2 and what GCC has with them, BMI, ADX
    r"addsubp[sd]|h(add|sub)p[sd]|lddqu|mov(ddup|s[hl]dup)|p(abs|sign|h(add|sub)|shufb|alignr|mulhrsw|maddubsw)|"
    r"(p?blend|round|dpp|insertp|extractp)|p(mov[sz]x|test|mulld|muldq|(insr|extr)[bdq]|cmp(eqq|gtq|[ei]str))|"
    r"p(max|min)(sb|sd|uw|ud)|packusdw|movntdqa|crc32|popcnt|lzcnt|tzcnt|andn[lq]|bls|bextr|bzhi|mulx|pdep|pext|rorx|"
    r"s(ar|hl|hr)x|ad[co]x|movbe"
)
AVX = r"v\w+\t"
AVX512 = r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])"
BF16 = r"vdpbf16|vcvtne2?ps2bf16"
TILES = r"%tmm|tile|ldtilecfg|sttilecfg"
NEVER = r"vp?(dpbus|dpwss|madd52|conflict|lzcnt|popcnt|shufbit|sh[lr]dv?[wdq]|multishift|compress[bw]|expand[bw])|"
NEVER += r"vperm([it]2)?b|vcvt\w*ph\b.*%zmm.*%zmm|v\w+sh\t|vaes|vpclmul|vgf2|(xbegin|rdrand|rdseed|sha\d)"
TIERS = {  # what its objects hold, and what they may not
    "portable": (r"%xmm", f"{AVX}|{NOT_IN_X86_64}|%[yz]mm"),
    "avx2": (r"%ymm", f"{AVX512}|{NEVER}"),
    "avx512": (r"%zmm", f"{BF16}|{TILES}|{NEVER}"),
    "avx512_bf16": (BF16, f"{TILES}|{NEVER}"),
    "amx": (r"tdpbf16ps", NEVER),
}


def objects(tier):
    """What the build has of a tier, by the name of its source."""
    folder = ROOT / "build" / "native" / "CMakeFiles" / f"tier_{tier}.dir" / "kernels" / "csrc"
    found = {path.name.removesuffix(".o"): path for path in folder.glob("*.o")}
    return found or pytest.skip(f"The library was not built here, or has no tier {tier}.")


def examined(name, *arguments):
    tool = shutil.which(name) or pytest.skip(f"There is no {name}.")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def instructions(path):
    """A line for each: mnemonic, tab, operands."""
    lines = examined("objdump", "-d", "--no-show-raw-insn", path).splitlines()
    code = (line.split("\t", 1)[1].split("<")[0] for line in lines if "\t" in line)
    return [re.sub(r" +", "\t", line, count=1) for line in code]


BF16_SOURCES = ("attention.cpp", "info_nce.cpp", "window_attention.cpp")

only_x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="Only x86-64 has more than one tier.")


@only_x86_64
@pytest.mark.parametrize("tier", TIERS)
def test_tier_objects(tier):
    """No instruction of a higher tier, or of an extension that none asks for: an older CPU would die in it. No
    function that several tiers emit either: the linker keeps one of them for all. And GCC drops calls of functions
    that do nothing but prefetch."""
    holds, lacks = (re.compile(pattern) for pattern in TIERS[tier])
    for source, path in objects(tier).items():
        code = instructions(path)
        assert not [line for line in code if lacks.match(line) or lacks.search(line, line.find("\t"))], source
        if tier not in ("avx512_bf16", "amx") or source in BF16_SOURCES:
            assert any(holds.search(line) for line in code), source
        if source in ("attention.cpp", "patch_gather.cpp", "masked_mse.cpp", "window_attention.cpp"):
            assert any(line.startswith("prefetch") for line in code), source
        if tier != "portable":  # which has the entries, and so functions of libraries
            symbols = examined("nm", "-C", "--defined-only", path).splitlines()
            assert not [
                line for line in symbols if re.search(rf" [TWVuBDR] (?!audiomae::{tier}::|DW\.ref\.)", line)
            ], source


@only_x86_64
def test_a_tier_that_holds_more_than_it_may_shows():
    """Each tier's objects break the rules of the tier below."""
    names = list(TIERS)
    for tier, below in zip(names[1:], names, strict=False):
        lacks = re.compile(TIERS[below][1])
        code = instructions(objects(tier)["window_attention.cpp"])
        assert any(lacks.search(line) for line in code), (tier, below)
