"""A video recorder: writes the episodes of a vector environment to one H.264 mp4 file, one episode after another.

All lanes are recorded at the same time. Therefore each episode is encoded separately, in memory, while it is played. At
the end the episodes are copied to the file, lane by lane, without encoding them again.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from gymnasium.vector import VectorEnv

from replay.errors import ConfigurationError, EnvironmentFailed, VideoFailed
from replay.types import Array

MAX_FRAMES = 20_000
_BITS_PER_FRAME = 100_000  # maximum of the average; with MAX_FRAMES a file has at most about 250 MB
_FRAMES_PER_SECOND = 30  # if the environment does not specify `render_fps`
_CODEC: Final = "libx264"


class Video:
    """A context manager that records episodes and writes the file when the block ends without an error.

    Attributes:
        path: path of the file.
        frames: frames in the file; an episode of n steps has n + 1 frames.
        left_out: frames that were not recorded, because their lane had reached its share of `MAX_FRAMES`.
    """

    def __init__(self, path: Path) -> None:
        """Check that a video can be encoded and that `path` names an mp4 file; an existing file is replaced at the end.

        Raises:
            ConfigurationError: the suffix is not .mp4, the path is a folder, or PyAV or its H.264 encoder is missing.
        """
        if path.suffix.lower() != ".mp4":
            raise ConfigurationError(f"the path of a video must end in .mp4, got {path}")
        if path.is_dir():
            raise ConfigurationError(f"cannot write {path}: it is a folder")
        try:
            import av

            av.Codec(_CODEC, "w")
        except ImportError as error:
            raise ConfigurationError("a video needs PyAV, which is not installed: pip install av") from error
        except ValueError as error:
            raise ConfigurationError(
                f"the installed PyAV has no {_CODEC} encoder; PyAV's wheels include it: "
                "pip install --force-reinstall --only-binary av av"
            ) from error
        # Render off screen; otherwise pygame searches for a display and reports that there is none.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        self.path = path
        self.frames = self.left_out = 0
        self._partial = path.with_name(f".{path.name}.part")
        self._rate = Fraction(_FRAMES_PER_SECOND)
        self._frames_per_lane = MAX_FRAMES
        self._current: dict[int, _EncodedEpisode] = {}  # lane -> its episode in progress
        self._finished: list[list[_EncodedEpisode]] = []  # finished episodes of each lane

    def __enter__(self) -> Video:
        """Create the temporary file.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        try:
            self._partial.touch()
        except OSError as error:
            raise ConfigurationError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    def begin(self, env: VectorEnv[Any, Any, Any], name: str | None) -> None:
        """Record the first frame of every lane, directly after a reset.

        Args:
            env: the rendered environment.
            name: its id, for errors.

        Raises:
            ConfigurationError: the environment cannot render, or renders something that is not a frame.
        """
        try:
            frames: Any = env.render()
        except Exception as error:  # renderers raise errors of many libraries
            raise ConfigurationError(f"cannot render {name}: {type(error).__name__}: {error}") from error
        for frame in [None] if frames is None else list(frames):
            shape: tuple[int, ...] = getattr(frame, "shape", ())
            dtype = getattr(frame, "dtype", None)
            if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
                raise ConfigurationError(
                    f"{name} renders {type(frame).__name__} of shape {shape}, dtype {dtype}; "
                    f"a video needs arrays of shape (height, width, 3), dtype uint8"
                )
        rate = env.metadata.get("render_fps")
        if isinstance(rate, int | float) and 1 <= rate <= 1_000:
            self._rate = Fraction(rate).limit_denominator(1_000)
        self._frames_per_lane = MAX_FRAMES // env.num_envs
        self._finished = [[] for _ in range(env.num_envs)]
        for lane in range(env.num_envs):
            self._add(lane, frames[lane])

    def record(
        self,
        env: VectorEnv[Any, Any, Any],
        lanes: Collection[int],
        *,
        ended: Collection[int],
        failed: Collection[int],
    ) -> None:
        """Record the frames after a step.

        Args:
            env: the rendered environment.
            lanes: lanes to record.
            ended: lanes whose episode ended with this step.
            failed: lanes whose environment was recreated; the current episode of these lanes is dropped.

        Raises:
            EnvironmentFailed: the environment cannot be rendered.
        """
        try:
            frames: Any = env.render()
        except Exception as error:
            raise EnvironmentFailed(f"cannot render the environment: {type(error).__name__}: {error}") from error
        for lane in lanes:
            if lane in failed:
                self._current.pop(lane, None)
                continue
            self._add(lane, frames[lane])
            if lane in ended and lane in self._current:
                episode = self._current.pop(lane)
                episode.end()
                self._finished[lane].append(episode)

    def _add(self, lane: int, frame: Array) -> None:
        recorded = sum(episode.frames for episode in self._finished[lane])
        if lane in self._current:
            recorded += self._current[lane].frames
        if recorded >= self._frames_per_lane:
            self.left_out += 1
            return
        if lane not in self._current:
            self._current[lane] = _EncodedEpisode(frame, self._rate)
        self._current[lane].add(frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the file, unless an error ended the block; an existing file is then kept.

        Raises:
            VideoFailed: the file cannot be written.
        """
        try:
            if kind is None:
                self._write()
                os.replace(self._partial, self.path)
        except OSError as write_error:
            raise VideoFailed(f"cannot write {self.path}: {write_error}") from write_error
        finally:
            self._partial.unlink(missing_ok=True)

    def _write(self) -> None:
        import av

        with self._partial.open("wb") as file, av.open(file, "w", format="mp4") as container:
            stream, offset = None, 0
            for episode in (episode for episodes in self._finished for episode in episodes):
                with av.open(episode.file, "r") as encoded:
                    source = encoded.streams.video[0]
                    stream = stream or container.add_stream_from_template(source)
                    for packet in encoded.demux(source):
                        if packet.pts is None or packet.dts is None:  # the demuxer's end marker
                            continue
                        packet.stream, packet.pts, packet.dts = stream, packet.pts + offset, packet.dts + offset
                        container.mux(packet)
                    offset += source.duration or 0
                self.frames += episode.frames


class _EncodedEpisode:
    """One episode as an mp4 file in memory; all episodes have the same encoding, so their packets can be joined."""

    def __init__(self, frame: Array, rate: Fraction) -> None:
        """Start the encoder, for frames of the size of `frame`; `rate` is in frames per second."""
        import av

        self.file, self.frames = BytesIO(), 0
        limit = str(round(rate * _BITS_PER_FRAME))
        self._container = av.open(self.file, "w", format="mp4")
        self._stream = self._container.add_stream(
            _CODEC, rate=rate, options={"preset": "veryfast", "crf": "20", "maxrate": limit, "bufsize": limit}
        )
        # Every player supports yuv420p. It stores color at half resolution, so the width and height must be even.
        self._stream.height, self._stream.width = (max(side - side % 2, 2) for side in frame.shape[:2])
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.max_b_frames = 0  # with B-frames there would be gaps between episodes
        self._stream.codec_context.thread_count = 1

    def add(self, frame: Array) -> None:
        """Encode a frame, `[height, width, 3]` uint8."""
        from av import VideoFrame

        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self._container.mux(self._stream.encode(picture.reformat(self._stream.width, self._stream.height, "yuv420p")))
        self.frames += 1

    def end(self) -> None:
        """Finish the encoding; `file` can then be read."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self.file.seek(0)
