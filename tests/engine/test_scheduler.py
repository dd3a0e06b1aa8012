"""What the engine would run, step by step, without a model or a device: each test plays the model's part by hand."""

import pytest

from nanochat_jax.engine.request import Request
from nanochat_jax.engine.scheduler import (
    LAST_CHUNK,
    PREFILL_CHUNK,
    PREFILL_ROWS,
    NewRow,
    PrefillBatch,
    PrefillChunk,
    Schedule,
    Scheduler,
    prefix_caching_saves_work,
)

CONTEXT = 2048


def scheduler(slots: int = 4, asynchronous: bool = False) -> Scheduler:
    return Scheduler(slots, CONTEXT, chunk=4, stop_ids=(0,), asynchronous=asynchronous)


def prompt(length: int, first: int = 1) -> list[int]:
    """`length` tokens; two prompts with different `first` have no prefix in common."""
    return [first, *range(100, 99 + length)]


def add(scheduler: Scheduler, *prompts: list[int], start: int = 1, **settings) -> None:
    for id, ids in enumerate(prompts, start):
        scheduler.add(id, Request(ids, **settings))


def generate(scheduler: Scheduler, schedule: Schedule, count: int = 1) -> None:
    """Appends `count` tokens to each sequence of a schedule, as the engine does after a step."""
    for sequence in schedule.sequences.values():
        sequence.ids += [7] * count
        sequence.left -= count


def started(schedule: Schedule) -> list[tuple[int, int]]:
    """(Request, sample) of each sequence that gets its first token."""
    return [(schedule.sequences[slot].prompt.id, schedule.sequences[slot].sample) for slot in schedule.first_tokens]


def batched(schedule: Schedule) -> list[int]:
    """The requests whose prompts are prefilled whole."""
    assert isinstance(schedule.prefill, PrefillBatch)
    return [prompt.id for prompt in schedule.prefill.prompts]


# -----------------------------------------------------------------------------
# Continuous batching


def test_samples_start_in_order_as_slots_become_free():
    queue = scheduler(slots=2)
    add(queue, prompt(5, 1), prompt(5, 2), prompt(5, 3), n=2)
    assert queue.waiting == 6
    first = queue.schedule()
    assert batched(first) == [1] and started(first) == [(1, 0), (1, 1)] and not first.decodes
    generate(queue, first)
    second = queue.schedule()
    assert second.decodes and second.prefill is None and list(second.sequences) == [0, 1]
    generate(queue, second, 4)
    queue.slots.release(1)
    third = queue.schedule()
    assert batched(third) == [2] and started(third) == [(2, 0)] and third.first_tokens == {1: 0}
    generate(queue, third)
    queue.slots.release(0)
    fourth = queue.schedule()  # its prompt is prefilled already
    assert fourth.prefill is None and started(fourth) == [(2, 1)] and queue.waiting == 2


def test_the_slot_that_has_been_free_longest_is_taken_first():
    queue = scheduler(slots=3)
    add(queue, prompt(5), n=3)
    generate(queue, queue.schedule())
    for slot in (2, 0, 1):
        queue.slots.release(slot)
    add(queue, prompt(5, 2), n=2, start=2)
    assert list(queue.schedule().first_tokens) == [2, 0]


def test_a_cancelled_request_leaves_the_queue_the_prefill_and_the_slots():
    queue = scheduler(slots=2)
    add(queue, prompt(5, 1), prompt(5, 2), n=3)
    generate(queue, queue.schedule())
    assert queue.prefill is not None
    queue.cancel(2)
    assert queue.waiting == 1
    queue.cancel(1)
    assert queue.waiting == 0 and queue.prefill is None and not queue.slots.running()


def test_a_request_for_scores_alone_takes_no_slot():
    queue = scheduler()
    add(queue, prompt(5), max_tokens=0, score=True, n=2)
    schedule = queue.schedule()
    assert [prompt.id for prompt in schedule.scored] == [1] and not schedule.sequences and queue.waiting == 0


# -----------------------------------------------------------------------------
# Batched prefill


@pytest.mark.parametrize(("lengths", "together"), [
    ([5, 6, 7, 8, 9], [1, 2, 3, 4]),
    ([5, 6, 7], [1, 2, 3]),
    ([5, 6], [1]),  # two rows of four would be padding
    ([5, 40, 6, 41, 7], [1, 3, 5]),  # of one length bucket only, whatever waits in between
    ([400, 401, 402, 403], [1, 2, 3, 4]),
    ([513, 514, 515], None),  # longer than a chunk
])  # fmt: skip
def test_prompts_of_one_length_bucket_are_prefilled_together(lengths, together):
    queue = scheduler()
    add(queue, *(prompt(length, first) for first, length in enumerate(lengths)))
    schedule = queue.schedule()
    if together is None:
        assert isinstance(schedule.prefill, PrefillChunk)
        return
    assert batched(schedule) == together
    assert schedule.prefill.rows == (PREFILL_ROWS if len(together) > 1 else 1)
    assert [id for id, _ in started(schedule)] == together


def test_a_batch_has_no_more_prompts_than_slots_are_free():
    queue = scheduler(slots=3)
    add(queue, *(prompt(5, first) for first in range(5)))
    assert batched(queue.schedule()) == [1, 2, 3]


def test_prompts_with_a_long_common_prefix_wait_for_the_first_one():
    queue = scheduler()
    system = prompt(150)
    add(queue, *([*system, i] for i in range(3)))
    first = queue.schedule()
    assert batched(first) == [1]
    generate(queue, first)
    second = queue.schedule()
    assert second.prefill == PrefillChunk([1], 150, LAST_CHUNK, NewRow(256, copied_slot=0))
    assert started(second) == [(2, 0)] and second.sequences[1].prompt.cached_tokens == 150


# -----------------------------------------------------------------------------
# Chunked prefill


@pytest.mark.parametrize(("length", "chunks"), [
    (513, [(0, 512), (512, 64)]),
    (576, [(0, 512), (512, 64)]),
    (577, [(0, 512), (512, 512)]),
    (1100, [(0, 512), (512, 512), (1024, 512)]),
    (CONTEXT, [(0, 512), (512, 512), (1024, 512), (1536, 512)]),
])  # fmt: skip
def test_a_long_prompt_is_computed_in_chunks_while_others_decode(length, chunks):
    queue = scheduler(slots=2)
    add(queue, prompt(5))
    generate(queue, queue.schedule())
    ids = prompt(length, 2)
    add(queue, ids, start=2)
    for i, (start, width) in enumerate(chunks):
        schedule = queue.schedule()
        chunk = schedule.prefill
        assert isinstance(chunk, PrefillChunk) and (chunk.start, chunk.width) == (start, width)
        assert chunk.ids == ids[start : start + width]
        assert (chunk.new_row is not None) == (i == 0)
        last = i == len(chunks) - 1
        assert schedule.decodes != last and started(schedule) == ([(2, 0)] if last else [])
    assert queue.waiting == 0


def test_the_last_chunk_overlaps_the_one_before_where_the_row_ends():
    queue = Scheduler(1, 700, chunk=4, stop_ids=(), asynchronous=False)
    ids = prompt(690)
    add(queue, ids)
    queue.schedule()
    chunk = queue.schedule().prefill
    assert chunk == PrefillChunk(ids[700 - PREFILL_CHUNK :], 700 - PREFILL_CHUNK, PREFILL_CHUNK, None)


# -----------------------------------------------------------------------------
# Prefix caching


@pytest.mark.parametrize(("shared", "tokens", "length", "saves"), [
    (0, 100, 128, False),
    (90, 100, 128, True),  # a chunk of 64 instead of 128 tokens
    (49, 100, 128, False),  # less than half
    (35, 100, 128, False),
    (20, 30, 32, False),  # a chunk of 64 is more than the whole prompt
    (300, 400, 512, False),  # 100 tokens would be a chunk of 512
    (340, 400, 512, True),
    (1000, 1010, CONTEXT, True),
    (600, 1100, CONTEXT, True),  # one chunk instead of three
    (513, 1025, CONTEXT, True),
    (10, 1010, CONTEXT, False),
])  # fmt: skip
def test_prefix_caching_is_used_where_it_saves_work(shared, tokens, length, saves):
    assert prefix_caching_saves_work(shared, tokens, length) == saves


def test_the_next_turn_of_a_chat_starts_from_the_slot_of_the_last_one():
    queue = scheduler(slots=2)
    turn = prompt(60)
    add(queue, prompt(5, 2), turn)
    for _ in range(2):
        generate(queue, queue.schedule())
    for slot in (0, 1):
        queue.slots.release(slot)
    add(queue, [*turn, *range(8)], start=3)
    schedule = queue.schedule()
    # Nothing has been computed from the token that was generated last.
    assert schedule.prefill == PrefillChunk(list(range(8)), 60, LAST_CHUNK, NewRow(128, copied_slot=1))
    assert list(schedule.sequences) == [0], "the longest free slot, not the one it continues"
    assert schedule.sequences[0].prompt.cached_tokens == 60


def test_nothing_is_reused_after_the_cache_is_cleared_or_for_scores():
    queue = scheduler(slots=1)
    turn = prompt(90)
    for start, (settings, clear, reused) in enumerate([({}, False, False), ({"score": True}, False, False),
                                                       ({}, False, True), ({}, True, False)]):  # fmt: skip
        if clear:
            queue.slots.clear_cache()
        add(queue, turn, start=start, **settings)
        schedule = queue.schedule()
        assert isinstance(schedule.prefill, PrefillChunk) == reused
        generate(queue, schedule)
        queue.slots.release(0)


def test_the_cache_holds_every_sequence_to_the_end_of_the_next_chunk():
    queue = scheduler(slots=2)
    add(queue, prompt(126), prompt(5, 2), max_tokens=100)
    sizes = []
    for count in (1, 1, 4, 4):
        schedule = queue.schedule()
        generate(queue, schedule, count)
        sizes.append(schedule.cache_size)
    assert sizes == [256, 256, 256, 256]  # 126 tokens and a chunk of 4
    queue.slots.release(0)
    assert queue.schedule().cache_size == 128
    assert queue.slots.cached_length(0) == 127, "the last position of a full row is where decoding writes"


# -----------------------------------------------------------------------------
# Asynchronous scheduling


def decoding(slots: int = 2, **settings) -> tuple[Scheduler, Schedule]:
    """An asynchronous scheduler whose slots are all in use, and the schedule of its first chunk."""
    queue = scheduler(slots, asynchronous=True)
    add(queue, prompt(5), n=slots, **settings)
    generate(queue, queue.schedule())
    return queue, queue.schedule()


def test_the_next_chunk_is_in_flight_until_the_last_one():
    queue, schedule = decoding(max_tokens=13)  # the first token, and 3 chunks
    flights = []
    for _ in range(3):
        flights.append((schedule.in_flight, schedule.next_in_flight))
        generate(queue, schedule, 4)
        schedule = queue.schedule()
    assert flights == [(False, True), (True, True), (True, False)]


def test_a_request_that_arrives_starts_after_the_chunk_in_flight():
    queue, schedule = decoding(max_tokens=100)
    generate(queue, schedule, 4)
    queue.slots.release(0)
    add(queue, prompt(5, 2), start=2)
    schedule = queue.schedule()
    assert (schedule.in_flight, schedule.next_in_flight, schedule.prefill) == (True, False, None)
    generate(queue, schedule, 4)
    assert started(queue.schedule()) == [(2, 0)]


def test_a_row_with_a_tool_call_waits_for_the_host():
    """Otherwise a row that has paused at the end of a call would stay paused for ever."""
    queue, schedule = decoding(max_tokens=100)
    generate(queue, schedule, 4)
    schedule.sequences[1].called = True
    schedule = queue.schedule()
    assert (schedule.in_flight, schedule.next_in_flight) == (True, False)
    schedule = queue.schedule()
    assert (schedule.in_flight, schedule.next_in_flight) == (False, False), "it may call again"
    queue.slots.release(1)
    assert queue.schedule().next_in_flight


def test_the_next_chunk_waits_if_the_cache_must_grow():
    queue, schedule = decoding(max_tokens=200)
    while schedule.next_in_flight:
        generate(queue, schedule, 4)
        schedule = queue.schedule()
    lengths = [sequence.length for sequence in schedule.sequences.values()]
    assert max(lengths) + 4 <= schedule.cache_size < max(lengths) + 8
    generate(queue, schedule, 4)
    following = queue.schedule()
    assert not following.in_flight and following.cache_size > schedule.cache_size
