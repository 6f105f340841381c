"""A whole run: the loop over the layers, the measurement of its result, the pages about it."""

import time
from contextlib import ExitStack

from vqllm.checkpoint.inspect import bits_per_weight, parameter_counts
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume.shared_run import SharedRun, own_scratch
from vqllm.core import memory
from vqllm.core.distributed import Processes
from vqllm.core.progress import Progress
from vqllm.plan.job import Job
from vqllm.quantization.loop import check, open_run, sequences_of
from vqllm.quantization.loop import quantize as run_pipeline
from vqllm.report.pages import report_pages
from vqllm.report.summary import Summary
from vqllm.runs import originals
from vqllm.runs.hooks import Hooks
from vqllm.runs.measure import Windows, held_out_windows, measure_against_original


def run(
    job: Job,
    windows: Windows | None,
    evaluate: bool,
    command: str,
    progress: Progress,
    *,
    hub_id: str | None,
    hooks: Hooks | None = None,
    processes: Processes | None = None,
) -> Summary | None:
    """Quantize, measure and write the pages, going on where an earlier run of the job stopped.

    Args:
        windows: what the result is measured on; None takes the held-out sequences.
        evaluate: False leaves it unmeasured.
        command: what the pages say the checkpoint was made with.
        processes: those that share the work.

    Returns:
        None in all but the first of several processes.

    Raises:
        VqllmError: a mistake that the message explains; finished layers are kept.
    """
    hooks, processes = hooks or Hooks(), processes or Processes()
    checked = processes.together(lambda: check(job))
    with ExitStack() as stack:
        # Only the first process writes.
        folder = processes.on_first(lambda: stack.enter_context(open_run(job)))
        if folder is not None:
            hooks.prepare(
                folder,
                job.recipe,
                lambda: sequences_of(job.source, job.recipe, job.device, job.trust_remote_code),
            )
        # The checkpoint, complete but for the pages about it.
        with own_scratch(job.output, folder, processes) as scratch:
            shared = SharedRun(folder, processes, scratch)
            outcome = run_pipeline(job, shared, checked, progress)
        if not job.is_part:
            processes.leave()
        if folder is None:
            return None
        if not job.is_part:
            originals.remember(job.output, job.origin, command, job.recipe.to_dict())
        # Its measurement.
        start = time.perf_counter()
        measured = None
        if evaluate:
            progress.phase("evaluation against the original")
            if hooks.measure is not None:
                measured = hooks.measure(outcome.held_out)
            else:
                chosen = windows or held_out_windows(job.recipe, outcome.held_out)
                measured = measure_against_original(job, chosen)
        seconds = {**outcome.seconds, "evaluation": time.perf_counter() - start}
        # The pages, with which the run is over.
        written = Checkpoint.open(job.output, verify=False)
        summary = Summary(
            model=job.model,
            hub_id=hub_id,
            recipe=job.recipe.name,
            command=command,
            output=job.output,
            bytes_before=folder.source_bytes(),
            bytes_after=written.num_bytes,
            bits_per_weight=bits_per_weight(written),
            parameters=parameter_counts(written),
            seconds=seconds,
            peak_memory_bytes=memory.peak_resident(),
            evaluation=measured,
            not_quantized=outcome.not_quantized,
        )
        hooks.finish(summary)
        recipe_yaml = job.recipe.to_yaml(with_paths=False)
        folder.complete(report_pages(outcome.records, summary, recipe_yaml))
    return summary
