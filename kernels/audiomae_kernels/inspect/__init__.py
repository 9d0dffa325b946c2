"""What the Triton kernels compile to, read without a GPU.

``python -m audiomae_kernels.inspect`` prints a table. It *rehearses* launches: a stand-in for Triton's driver
names the GPU under test and does nothing on load and launch, so that the host code runs on CPU tensors and
compiles exactly the binaries of a user with that GPU, specialised on the same arguments. The binaries are
read with the disassemblers that come with Triton; the bytes that each program moves are counted in Triton's
interpreter, in a process of its own. Times are predictions from bytes and FLOPs: nothing is measured here.

    targets.py    the GPUs: limits, bandwidths, peaks
    rehearsal.py  the stand-in driver
    launches.py   calls of each op at the models' sizes, with the bytes that they must move
    binaries.py   registers, spills, access widths and instructions of a binary
    survey.py     all of this for many targets, dtypes and alignments
    traffic.py    bytes moved, by interpretation
    lint.py       the rules, and the comparison with a reviewed baseline
"""
