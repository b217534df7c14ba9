"""Parts computed by the actors of a Ray cluster; Ray is an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.campaign.parts import Campaign, Outcome
from matxfer.errors import OptionError
from matxfer.prediction import BatchOptions, Predictor

if TYPE_CHECKING:
    from collections.abc import Callable


class PartWorker:
    """An actor that loads the model once and computes parts.

    Parameters
    ----------
    folder, model, plugins, inputs, options, part_size
        As of :class:`matxfer.campaign.parts.Campaign`; paths that every node can reach.
    """

    def __init__(
        self,
        folder: str,
        model: str,
        plugins: list[str],
        inputs: list[str],
        options: dict[str, Any],
        part_size: int,
    ) -> None:
        predictor = Predictor(model, plugins)
        self.campaign = Campaign(
            Path(folder),
            predictor,
            inputs,
            BatchOptions(**options),
            part_size=part_size,
            resume=True,
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute the part that the row names; return it with its number of rows."""
        wanted = int(row["part"])
        outcome = self.campaign.run(parts=lambda part: part == wanted)
        return {"part": wanted, "rows": outcome.rows, "failed": outcome.errors.total()}


def run_with_ray(
    campaign: Campaign,
    *,
    actors: int | None = None,
    on_part: Callable[[int, int], None] = lambda *_: None,
) -> Outcome:
    """Compute the missing parts of a campaign with Ray Data, one part per task.

    Ray is connected to the cluster that ``$RAY_ADDRESS`` names, else started on this machine.
    Model, plugins, inputs and folder have to be where every node can reach them.

    Parameters
    ----------
    campaign
        The prediction.
    actors
        How many processes compute, one CPU each; ``None``: as many as the cluster has CPUs.
    on_part
        Called with rows and failed rows of each part.

    Raises
    ------
    OptionError
        If Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise OptionError(
            "--engine ray needs Ray: pip install 'matxfer[ray]', or leave the option out"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        missing = campaign.missing()
        count = actors or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        outcome = Outcome()
        if missing:
            tasks = ray.data.from_items(
                [{"part": part} for part in missing], override_num_blocks=len(missing)
            )
            results = tasks.map(
                PartWorker,
                fn_constructor_args=_arguments(campaign),
                num_cpus=1,
                concurrency=min(count, len(missing)),
            )
            for result in results.iter_rows():
                outcome.rows += result["rows"]
                on_part(result["rows"], result["failed"])
        campaign.finish(outcome)
        return outcome
    finally:
        if started:
            ray.shutdown()


def _arguments(campaign: Campaign) -> tuple[Any, ...]:
    """Return the campaign's description; an actor may run in another folder on another node."""
    predictor, options = campaign.predictor, campaign.options
    folders = [predictor.model.folder, *(plugin.folder for plugin in predictor.plugins)]
    model, *plugins = [str(folder.resolve()) for folder in folders if folder is not None]
    settings = {
        "structure_column": options.structure_column,
        "workers": 0,
        "max_atoms": options.max_atoms,
        "cache": options.cache,
    }
    folder, inputs = str(campaign.folder.resolve()), [str(i) for i in campaign.inputs]
    return folder, model, plugins, inputs, settings, campaign.part_size
