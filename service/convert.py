"""Our events in the words of ``tidegate.v1``."""

from collections.abc import Iterable
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from tidegate.engine import messages
from tidegate.engine.messages import ProgressKind, Stats, TierStats
from tidegate.engine.request import FinishReason
from tidegate.service import events
from tidegate.v1 import control_pb2, events_pb2, inference_pb2

FINISH_REASONS = {
    FinishReason.STOP_TOKEN: events_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: events_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.GRAMMAR_COMPLETE: events_pb2.FINISH_REASON_GRAMMAR_COMPLETE,
    FinishReason.MAX_TOKENS: events_pb2.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_LENGTH: events_pb2.FINISH_REASON_CONTEXT_LENGTH,
    FinishReason.DEADLINE: events_pb2.FINISH_REASON_DEADLINE,
    FinishReason.CANCELLED: events_pb2.FINISH_REASON_CANCELLED,
}
"""All but ``ERROR``, which is a status on the wire."""

PROGRESS_KINDS = {
    ProgressKind.STALLED: events_pb2.PROGRESS_KIND_STALLED,
    ProgressKind.PREEMPTED: events_pb2.PROGRESS_KIND_PREEMPTED,
    ProgressKind.PARKED: events_pb2.PROGRESS_KIND_PARKED,
    ProgressKind.RESUMED: events_pb2.PROGRESS_KIND_RESUMED,
    ProgressKind.DROPPED: events_pb2.PROGRESS_KIND_DROPPED,
    ProgressKind.RECOVERED: events_pb2.PROGRESS_KIND_RECOVERED,
}


def admitted(event: events.Admitted) -> events_pb2.Admitted:
    return events_pb2.Admitted(
        request_id=event.request_id,
        queue_position=event.queue_position,
        prompt_tokens=event.prompt_tokens,
        cached_device_tokens=event.cached_device_tokens,
        cached_host_tokens=event.cached_host_tokens,
        seed=event.seed,
        prompt_token_ids=event.prompt_token_ids,
    )


def fill_batch(batch: events_pb2.Batch, deltas: Iterable[events.Delta]) -> None:
    """In place, since a message that is built apart is copied into the one that holds it; and field by
    field, which takes two thirds of the time that keyword arguments take.
    """
    add = batch.deltas.add
    for event in deltas:
        message = add()
        message.request_id = event.request_id
        if event.choice:
            message.choice = event.choice
        message.offset = event.offset
        if len(event.token_ids) == 1:
            message.token_ids.append(event.token_ids[0])
        else:
            message.token_ids.extend(event.token_ids)
        message.text = event.text
        if event.logprobs:
            message.logprobs.extend(map(position_logprobs, event.logprobs))
        if event.finish_reason is not None:
            message.finish_reason = FINISH_REASONS[event.finish_reason]


def position_logprobs(position: messages.PositionLogprobs) -> events_pb2.PositionLogprobs:
    return events_pb2.PositionLogprobs(chosen=_logprob(position.chosen), top=map(_logprob, position.top))


def prompt_logprobs(event: events.PromptLogprobs) -> events_pb2.PromptLogprobs:
    return events_pb2.PromptLogprobs(
        request_id=event.request_id,
        offset=event.offset,
        positions=map(position_logprobs, event.positions),
    )


def progress(event: events.Progress) -> events_pb2.Progress:
    return events_pb2.Progress(
        request_id=event.request_id, choice=event.choice, kind=PROGRESS_KINDS[event.kind]
    )


def finished(event: events.Finished) -> events_pb2.Finished:
    return events_pb2.Finished(
        request_id=event.request_id,
        choices=map(_choice_end, event.choices),
        usage=events_pb2.Usage(
            prompt_tokens=event.usage.prompt_tokens,
            output_tokens=event.usage.output_tokens,
            cached_tokens=event.usage.cached_tokens,
            recomputed_tokens=event.usage.recomputed_tokens,
            preemptions=event.usage.preemptions,
        ),
        timings=events_pb2.Timings(
            queued=event.timings.queued,
            to_first_token=event.timings.to_first_token,
            total=event.timings.total,
        ),
    )


def completion(end: events.ChoiceEnd, whole: events.Delta | None) -> inference_pb2.Completion:
    """``whole``: all deltas of the choice as one; None where there were none."""
    message = inference_pb2.Completion(choice=end.choice, finish_reason=FINISH_REASONS[end.reason])
    if whole is not None:
        message.token_ids.extend(whole.token_ids)
        message.text = whole.text
        message.logprobs.extend(map(position_logprobs, whole.logprobs or ()))
    return message


def load(stats: Stats, is_draining: bool) -> events_pb2.Load:
    return events_pb2.Load(
        waiting=stats.waiting,
        running=stats.running,
        stalled=stats.stalled,
        swapped=stats.swapped,
        device=_tier(stats.device),
        host=_tier(stats.host),
        draining=is_draining,
    )


def totals(stats: Stats) -> control_pb2.Totals:
    return control_pb2.Totals(
        **{field.name: getattr(stats, field.name) for field in control_pb2.Totals.DESCRIPTOR.fields}
    )


def sequence(view: messages.SequenceView, request_id: str | None) -> control_pb2.SequenceState:
    return control_pb2.SequenceState(
        request_id=request_id,
        choice=view.choice,
        status=view.status,
        priority=view.priority,
        prompt_tokens=view.prompt_tokens,
        output_tokens=view.output_tokens,
        computed_tokens=view.computed_tokens,
        device_blocks=view.device_blocks,
        host_blocks=view.host_blocks,
        seconds=view.seconds,
    )


def link(swaps: messages.SwapStats) -> control_pb2.Link:
    return control_pb2.Link(
        bytes=sum(swaps.bytes.values()), queue_bytes=swaps.queue_bytes, utilization=swaps.utilization
    )


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def _logprob(one: messages.Logprob) -> events_pb2.Logprob:
    return events_pb2.Logprob(token_id=one.token_id, logprob=one.logprob, rank=one.rank)


def _choice_end(end: events.ChoiceEnd) -> events_pb2.ChoiceEnd:
    return events_pb2.ChoiceEnd(
        choice=end.choice,
        reason=FINISH_REASONS[end.reason],
        output_tokens=end.output_tokens,
        stop_string=end.stop_string,
        stop_token_id=end.stop_token_id,
    )


def _tier(stats: TierStats) -> events_pb2.TierLoad:
    return events_pb2.TierLoad(total=stats.total, free=stats.free, reclaimable=stats.reclaimable)
