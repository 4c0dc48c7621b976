"""WandBSink: a Weights & Biases run, online or offline, that never blocks training.

wandb sends everything to a child process, wandb-core, and waits for it. Here a background thread
waits instead: if the server is unreachable, or wandb-core is frozen or killed, a call still costs
the training thread the same microseconds. The x axis is `global_step`, logged as a value: wandb
drops rows whose own step doesn't increase.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import netrc
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from dream_callbacks.logging.frames import figure_png, image_frames, video_frames
from dream_callbacks.logging.png import Frame
from dream_callbacks.logging.sinks.background import BackgroundSink
from dream_callbacks.logging.sinks.base import DeferredSink, Histogram, LoggedRun, OpenedSink
from dream_callbacks.logging.sinks.wandb_service import kill_services, running_services
from dream_callbacks.logging.source_files import source_files
from dream_callbacks.logging.to_jsonable import as_number, encode_non_finite, to_jsonable

logger = logging.getLogger(__name__)

STEP = "global_step"
"""Name of the x axis."""

_ID_FILE = "wandb-run.json"
_OFFLINE_CLOSE_S = 10.0
_PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

_own_runs: weakref.WeakSet[Any] = weakref.WeakSet()
"""Runs opened here. Any other active run is the user's: it is logged to but not finished."""


class WandBSink(DeferredSink):
    """Logs to Weights & Biases.

    Without an API key, or if the server is unreachable, the run is logged offline below the run
    directory; `wandb sync` uploads it later. A resumed run keeps its id, which is stored in
    `wandb-run.json` in the run directory. If the script has called `wandb.init` itself, that run
    is used, and the script must finish it.

    Args:
        mode: "online", "offline" or "disabled". Default: wandb's own setting (WANDB_MODE,
            `wandb offline`).
        project: Default: the trainer's project.
        entity: Default: the account's default entity.
        group: Default: the trainer's group.
        name: Default: the trainer's experiment.
        id: Default: a random id, stored for resuming.
        tags: Tags of the run.
        notes: Notes of the run.
        job_type: Job type of the run.
        settings: Further arguments of `wandb.Settings`.
        init_timeout_s: How long to wait for the server before logging offline. Training waits
            for at most 5 s of it.
        finish_timeout_s: How long uploading may take at the end; `wandb sync` uploads the rest.

    Raises:
        ValueError: If `mode` is unknown.
    """

    survives_crash = False

    def __init__(
        self,
        mode: Literal["online", "offline", "disabled"] | None = None,
        *,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        id: str | None = None,  # noqa: A002  # wandb's name for it
        tags: Sequence[str] = (),
        notes: str | None = None,
        job_type: str | None = None,
        settings: Mapping[str, Any] | None = None,
        init_timeout_s: float = 30.0,
        finish_timeout_s: float = 60.0,
    ) -> None:
        if mode not in (None, "online", "offline", "disabled"):
            raise ValueError(
                f'mode={mode!r}: "online", "offline", "disabled" or None (wandb\'s own setting) '
                "is required"
            )
        self.mode = mode
        self.project = project
        self.entity = entity
        self.group = group
        self.name = name
        self.id = id
        self.tags = tuple(tags)
        self.notes = notes
        self.job_type = job_type
        self.settings = dict(settings or {})
        self.init_timeout_s = init_timeout_s
        self.finish_timeout_s = finish_timeout_s

    def check(self) -> None:
        if find_spec("wandb") is None:
            raise ImportError("WandBSink needs wandb: pip install 'dream-callbacks-logging[wandb]'")

    def open(self, run: LoggedRun) -> WandBRun:
        self.check()
        # Not on the thread: if the process forks while the thread holds an import lock, the child
        # hangs.
        import wandb

        run.run_dir.mkdir(parents=True, exist_ok=True)
        return WandBRun(self, run, wandb)


class WandBRun(BackgroundSink):
    """An opened WandBSink.

    Args:
        sink: The sink to open.
        run: The run to log.
        wandb: The wandb module.
    """

    def __init__(self, sink: WandBSink, run: LoggedRun, wandb: Any) -> None:
        self._run: Any = None
        self._wandb = wandb
        services = running_services()  # started by the user: never killed here

        def open_connection() -> OpenedSink:
            connection = _Connection(sink, run, wandb, services)
            self._run = connection.run
            return connection

        super().__init__(
            "W&B",
            open_connection,
            abort=lambda: kill_services(running_services() - services),
            open_timeout_s=2.0 * sink.init_timeout_s + 30.0,
        )

    @property
    def run(self) -> Any:
        """The `wandb.Run`; None until it is open, or if opening failed.

        Its methods wait for wandb-core, unlike those of this sink.
        """
        return self._run

    def _give_up(self, what: str, error: Exception) -> None:
        super()._give_up(what, error)
        if isinstance(error, ConnectionError):  # wandb-core has exited
            _tear_down(self._wandb)


class _Connection(OpenedSink):
    """Runs on the thread of a BackgroundSink, which handles its errors."""

    def __init__(self, sink: WandBSink, logged: LoggedRun, wandb: Any, services: set[int]) -> None:
        self._sink = sink
        self._logged = logged
        self._wandb = wandb
        self._services = services
        self._pending: dict[str, Any] = {}
        self._pending_step = logged.step
        self._copied: list[Path] = []
        active = wandb.run
        self._is_own = active is None or active in _own_runs
        self._id = self._run_id() if self._is_own else None
        self.run = self._open_run() if self._is_own else active
        if self._is_own:
            _own_runs.add(self.run)
        is_offline = self.run.settings.mode != "online"
        self.close_timeout_s = _OFFLINE_CLOSE_S if is_offline else sink.finish_timeout_s
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        numbers = {name: as_number(value) for name, value in values.items()}
        self._add({name: number for name, number in numbers.items() if number is not None}, step)

    def log_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        bins = (list(histogram.counts), list(histogram.edges))
        self._add({name: self._wandb.Histogram(np_histogram=bins)}, step)

    def log_images(self, name: str, images: Any, step: int, captions: Any = None) -> None:
        pictures = [_pil_image(frame) for frame in image_frames(images)]
        texts = _captions(captions, len(pictures))
        wandb_images = [
            self._wandb.Image(picture, caption=text)
            for picture, text in zip(pictures, texts, strict=True)
        ]
        self._add({name: wandb_images}, step)

    def log_videos(self, name: str, videos: Any, step: int, fps: int = 8) -> None:
        folder = self._logged.run_dir / "wandb" / "to-log"
        folder.mkdir(parents=True, exist_ok=True)
        wandb_videos = []
        for frames in video_frames(videos):
            first, *others = [_pil_image(frame) for frame in frames]
            path = folder / f"{secrets.token_hex(8)}.gif"
            duration_ms = 1000 // max(1, fps)
            first.save(path, save_all=True, append_images=others, duration=duration_ms, loop=0)
            self._copied.append(path)
            wandb_videos.append(self._wandb.Video(str(path), format="gif"))
        self._add({name: wandb_videos}, step)

    def log_plot(self, name: str, figure: Any, step: int) -> None:
        from PIL import Image

        picture = figure_png(figure)
        if picture:
            self._add({name: self._wandb.Image(Image.open(io.BytesIO(picture)))}, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        # wandb stores JSON, which has no NaN; a resumed run may have changed values.
        self.run.config.update(encode_non_finite(to_jsonable(config)), allow_val_change=True)

    def log_code(self, directory: Path) -> None:
        sources = source_files(directory, leave_out=self._logged.run_dir)
        wanted = {str((directory / path).resolve()) for path in sources.paths}
        self.run.log_code(
            str(directory), include_fn=lambda path, *_: str(Path(path).resolve()) in wanted
        )

    def flush(self) -> None:
        if self._pending:
            self.run.log({STEP: self._pending_step, **self._pending})
            self._pending = {}
        while self._copied:  # wandb keeps a copy
            self._copied.pop().unlink(missing_ok=True)

    def close(self, error: BaseException | None = None) -> None:
        self.flush()
        if self._is_own:
            self.run.finish(exit_code=_exit_code(error))

    def _add(self, values: Mapping[str, Any], step: int) -> None:
        """Collect the values of one step, so that they become one row."""
        if step != self._pending_step or not values.keys().isdisjoint(self._pending):
            self.flush()
        self._pending_step = step
        self._pending.update(values)

    # Opening

    def _open_run(self) -> Any:
        mode = self._sink.mode or str(self._wandb.setup().settings.mode)
        if mode == "online" and not has_api_key(self._wandb):
            logger.warning(
                "W&B has no API key, so the run is logged offline; `wandb login` sets a key, and "
                "`wandb sync` uploads the run"
            )
            mode = "offline"
        if mode == "online":
            try:
                return self._init(mode)
            except Exception as error:  # noqa: BLE001  # after any error, log offline
                logger.warning(
                    "the W&B server can't be reached (%s), so the run is logged offline; "
                    "`wandb sync` uploads it",
                    str(error).partition("\n")[0],
                )
                # wandb-core holds the run's id until it exits.
                kill_services(running_services() - self._services)
                _tear_down(self._wandb)
                mode = "offline"
        run = self._init(mode)
        if mode == "offline":
            logger.info("W&B is offline; to upload the run: wandb sync %s", Path(run.dir).parent)
        return run

    def _init(self, mode: str) -> Any:
        sink, logged = self._sink, self._logged
        settings = {
            "console": "off",  # it would capture the progress bar's output
            "init_timeout": sink.init_timeout_s,
            "quiet": True,
            "silent": mode != "online",
            **sink.settings,
        }
        return self._wandb.init(
            mode=mode,
            project=sink.project or logged.project,
            entity=sink.entity,
            group=sink.group or logged.group,
            name=sink.name or logged.experiment,
            id=self._id,
            resume=None if mode == "offline" else "allow",  # offline, wandb only warns about it
            tags=sink.tags or None,
            notes=sink.notes,
            job_type=sink.job_type or ("evaluation" if logged.is_evaluation else None),
            dir=str(logged.run_dir),
            settings=self._wandb.Settings(**settings),
        )

    def _run_id(self) -> str | None:
        """Id of the run: stored by the resumed run, or new."""
        if self._sink.id is not None:
            return self._sink.id
        if "WANDB_RUN_ID" in os.environ or "WANDB_SWEEP_ID" in os.environ:
            return None  # wandb reads the id from the environment
        path = self._logged.run_dir / _ID_FILE
        if self._logged.step > 0:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        run_id = secrets.token_hex(4)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")
        temporary.replace(path)
        return run_id


def has_api_key(wandb: Any) -> bool:
    """Whether wandb can log in without prompting on the terminal, over the progress bar.

    Checks the same places as wandb; `wandb.login` itself would contact the server.
    """
    settings = wandb.setup().settings
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    if settings.api_key or settings.identity_token_file:
        return True
    host = urlsplit(settings.base_url).hostname or ""
    own = os.environ.get("NETRC")
    candidates = [own] if own else ["~/.netrc", "~/_netrc"]
    for path in (Path(candidate).expanduser() for candidate in candidates):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def _tear_down(wandb: Any) -> None:
    """Make wandb forget a wandb-core that has exited; it would wait for it at exit."""
    with contextlib.suppress(Exception, SystemExit):  # it raises because the process has exited
        wandb.teardown(exit_code=1)


def _exit_code(error: BaseException | None) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0 if error is None else 1


def _captions(captions: Any, num_images: int) -> list[str | None]:
    texts = captions if isinstance(captions, (list, tuple)) else [captions] * num_images
    padded = [*texts, *[None] * num_images][:num_images]
    return [None if text is None else str(text) for text in padded]


def _pil_image(frame: Frame) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        raise ImportError(
            "images in W&B need pillow: pip install 'dream-callbacks-logging[wandb]'"
        ) from None
    return Image.frombytes(_PIL_MODES[frame.channels], (frame.width, frame.height), frame.pixels)
