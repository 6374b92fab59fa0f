"""Early launches in the PTX emulator, on programs written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx.cta import Cta, Launch
from ptx.fault import Fault
from ptx.global_memory import GlobalMemory
from ptx.launch_order import LaunchOrder
from ptx.program import parse
from ptx.translation import Translation

from turret.kernels.gpu.shared import tuning as tuning_module
from turret.kernels.gpu.shared.tuning import Tuning

THREADS = 32
HEAD = f"""
.visible .entry k(.param .u64 .ptr .global k_param_0, .param .u64 .ptr .global k_param_1)
.reqntid {THREADS}
{{
.reg .pred %p<9>; .reg .b32 %r<20>; .reg .b64 %rd<20>;
ld.param.b64 %rd0, [k_param_0]; ld.param.b64 %rd1, [k_param_1];
mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 4;
add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
"""
# A thread's word of the first and of the second tensor.
READ, WRITE = "ld.global.b32 %r1, [ %rd3 ];", "st.global.b32 [ %rd4 ], %r0;"
WAIT = "griddepcontrol.launch_dependents; griddepcontrol.wait;"


class Stream:
    """Launches programs one after the other."""

    def __init__(self) -> None:
        self.order = LaunchOrder()

    def launch(
        self,
        name: str,
        body: str,
        *tensors: torch.Tensor,
        early: bool = False,
        programs: int = 1,
    ) -> None:
        with self.order.launch(name, early) as unfinished:
            memory = GlobalMemory(unfinished)
            given = [memory.add(tensor.numpy().view(np.uint8)) for tensor in tensors]
            translation = Translation(parse(f"{HEAD}{body}\nret;\n}}"))
            launch = Launch((programs, 1, 1), given, memory, THREADS, 16)
            for number in range(programs):
                translation.run(Cta(launch, number, (number, 0, 0)))
            self.order.ended(memory.written(name))


def words() -> torch.Tensor:
    return torch.zeros(THREADS, dtype=torch.int32)


@pytest.fixture
def stream() -> Stream:
    return Stream()


def test_a_program_that_waits_reads_what_the_launch_before_wrote(stream):
    a, b, c = words(), words(), words()
    stream.launch("first", WRITE, a, b)
    stream.launch("second", f"{WAIT} {READ} {WRITE}", b, c, early=True)
    assert torch.equal(b, c)
    assert b[-1] == THREADS - 1


def test_before_it_has_waited_it_reads_what_nobody_writes(stream):
    a, b, c = words(), words(), words()
    stream.launch("first", WRITE, a, b)
    stream.launch("second", f"{READ} {WAIT} {WRITE}", a, c, early=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{READ} {WAIT}", r"load of 4 bytes from 0x\w+ on, which first writes, before .* waited"),
        (f"{WRITE} {WAIT}", "a store before the program has waited"),
        (f"setp.eq.s32 %p1, %r0, 0; mov.u32 %r1, 0; @%p1 atom.global.gpu.acq_rel.add.u32 %r1,"
         f" [ %rd1 ], 1; {WAIT}", "an atomic addition before the program has waited"),
        (f"griddepcontrol.launch_dependents; {READ} {WAIT}", "first writes"),
        ("griddepcontrol.launch_dependents;", "the program ends and has not waited"),
    ],
)  # fmt: skip
def test_faults(stream, body, message):
    a, b, c = words(), words(), words()
    stream.launch("first", WRITE, a, b)
    with pytest.raises(Fault, match=message):
        stream.launch("second", body, b, c, early=True)


@pytest.mark.parametrize("body", [f"{READ} {WRITE}", f"{READ} {WAIT} {WRITE}"])
def test_another_launch_waits_as_a_whole(stream, body):
    a, b, c = words(), words(), words()
    stream.launch("first", WRITE, a, b)
    stream.launch("second", body, b, c)


def test_one_program_that_does_not_wait(stream):
    """The others' waits are not its own."""
    a, b, c = words(), words(), words()
    body = f"mov.u32 %r2, %ctaid.x; setp.eq.s32 %p1, %r2, 1; @%p1 ret; {WAIT} {WRITE}"
    stream.launch("first", WRITE, a, b)
    stream.launch("second", body, b, c, early=True)
    with pytest.raises(Fault, match="ends and has not waited"):
        stream.launch("third", body, b, c, early=True, programs=2)


def test_a_launch_that_may_still_run_behind_one_that_let_the_next_begin(stream):
    """The second may let the third begin before it has waited for the first itself."""
    a, b, c, d = words(), words(), words(), words()
    stream.launch("first", WRITE, a, b)
    stream.launch("second", f"{WAIT} {WRITE}", a, c, early=True)
    with pytest.raises(Fault, match="which first writes"):
        stream.launch("third", f"{READ} {WAIT} {WRITE}", b, d, early=True)


def test_what_came_before_a_launch_that_waited_as_a_whole_has_ended(stream):
    a, b, c, d = words(), words(), words(), words()
    stream.launch("first", WRITE, a, b)
    stream.launch("second", WRITE, a, c)
    stream.launch("third", f"{READ} {WAIT} {WRITE}", b, d, early=True)
    with pytest.raises(Fault, match="which second writes"):
        stream.launch("fourth", f"{READ} {WAIT} {WRITE}", c, d, early=True)


def test_memory_is_known_by_where_it_lies(stream):
    """A part of what the launch before wrote, by another tensor."""
    a, both = words(), torch.zeros(2 * THREADS, dtype=torch.int32)
    stream.launch("first", WRITE, a, both[THREADS:])
    stream.launch("second", f"{READ} {WAIT}", both[:THREADS], a, early=True)
    with pytest.raises(Fault, match="which first writes"):
        stream.launch("third", f"{READ} {WAIT}", both[1 : THREADS + 1], a, early=True)


def test_what_torch_does_between_is_a_launch(stream):
    a, b, c = words(), words(), words()
    stream.launch("first", WRITE, a, b)
    with stream.order.watching():
        summed = a + 1
        c.add_(1)
    # The addition to c has waited for everything before it, and it alone may still run.
    for ended in (b, summed):
        stream.launch("second", f"{READ} {WAIT}", ended, a, early=True)
    with pytest.raises(Fault, match="which torch's add_ writes"):
        stream.launch("third", f"{READ} {WAIT}", c, a, early=True)


def test_what_torch_only_looks_at_is_none(stream):
    a, b = words(), words()
    stream.launch("first", WRITE, a, b)
    with stream.order.watching():
        views = b.view(2, -1)[1:].split(4, dim=1)
        fresh = torch.empty_like(b)
    assert len(views) == 4
    with pytest.raises(Fault, match="which first writes"):
        stream.launch("second", f"{READ} {WAIT}", b, fresh, early=True)


def test_no_early_launch_behind_a_copy(stream):
    a, b = words(), words()
    with stream.order.watching():
        copied = a.clone()
    stream.launch("first", READ, copied, b)
    with stream.order.watching():
        b.copy_(a)
    with pytest.raises(Fault, match=r"second is launched early behind a copy \(copy_\)"):
        stream.launch("second", f"{WAIT} {READ}", a, b, early=True)
    with stream.order.watching():
        b.copy_(a)
        b.add_(1)
    stream.launch("third", f"{WAIT} {READ}", b, a, early=True)


def test_what_is_fetched_ahead_is_not_read_but_must_be_there(stream):
    a, b = words(), words()
    stream.launch("first", WRITE, a, b)
    stream.launch("second", f"prefetch.global.L2 [%rd3]; {WAIT}", b, a, early=True)
    with pytest.raises(Fault, match="prefetch of 1 bytes at 128, out of bounds"):
        stream.launch("third", f"prefetch.global.L2 [%rd3+4]; {WAIT}", b, a, early=True)


@pytest.mark.parametrize(
    ("capability", "early"),
    [((8, 9), {}), ((9, 0), {"launch_pdl": True}), ((12, 0), {"launch_pdl": True})],
)
def test_only_devices_from_hopper_on_have_early_launches(monkeypatch, capability, early):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setitem(tuning_module._TABLE, "a card", Tuning(launch_pdl=True))
    tuning_module.tuning.cache_clear()
    tuned = tuning_module.tuning(torch.device("cuda"))
    tuning_module.tuning.cache_clear()
    assert tuned.early() == early
    assert tuned.early(is_behind_kernel=False) == {}
    assert Tuning().early() == {}
