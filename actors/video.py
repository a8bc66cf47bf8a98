"""Video: episodes of a vector environment's lanes, written to one H.264 mp4 file, one episode after the other.

Lanes play at the same time, so each episode is encoded by itself, in memory, while it is played. At the end the
episodes are put into the file, lane after lane, without being encoded again.
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

MOST_FRAMES = 20_000
_BITS_A_FRAME = 100_000  # on average, at most: with MOST_FRAMES a file has at most about 250 MB
_FRAMES_PER_SECOND = 30  # where an environment does not say
_CODEC: Final = "libx264"


class Video:
    """Records what lanes play. Use as a `with` block: the file appears at its end, unless an error ends it.

    Attributes:
        frames: in the file; an episode of n steps has n + 1.
        left_out: frames that were not recorded, because a lane had its share of `MOST_FRAMES`.
    """

    def __init__(self, path: Path) -> None:
        """Check that a video can be written to `path`; a file that is there is replaced at the end.

        Raises:
            ConfigurationError: another suffix than .mp4, a folder that is missing, or no PyAV.
        """
        if path.suffix.lower() != ".mp4":
            raise ConfigurationError(f"a video is an .mp4 file, got {path}")
        if path.is_dir():
            raise ConfigurationError(f"cannot write {path}: it is a folder")
        try:
            import av

            av.Codec(_CODEC, "w")
        except ImportError as error:
            raise ConfigurationError("a video needs PyAV, which is not installed: pip install av") from error
        except ValueError as error:
            raise ConfigurationError(
                f"this PyAV has no {_CODEC}; its wheels have: pip install --force-reinstall --only-binary av av"
            ) from error
        # Frames are drawn off screen; without this, pygame looks for a display and complains that there is none.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        self.path = path
        self.frames = self.left_out = 0
        self._partial = path.with_name(f".{path.name}.part")
        self._rate = Fraction(_FRAMES_PER_SECOND)
        self._most = MOST_FRAMES
        self._open: dict[int, _Episode] = {}
        self._done: list[list[_Episode]] = []

    def __enter__(self) -> Video:
        """Begin the file.

        Raises:
            ConfigurationError: it cannot be written.
        """
        try:
            self._partial.touch()
        except OSError as error:
            raise ConfigurationError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    def begin(self, env: VectorEnv[Any, Any, Any], name: str | None) -> None:
        """Take the first frame of every lane of a rendered environment that was just reset.

        Raises:
            ConfigurationError: it does not render, or something that is no frame.
        """
        try:
            frames: Any = env.render()
        except Exception as error:  # a renderer raises whatever its libraries do
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
        self._most = MOST_FRAMES // env.num_envs
        self._done = [[] for _ in range(env.num_envs)]
        for lane in range(env.num_envs):
            self._add(lane, frames[lane])

    def take(
        self,
        env: VectorEnv[Any, Any, Any],
        playing: Collection[int],
        *,
        ended: Collection[int],
        failed: Collection[int],
    ) -> None:
        """Take the frames after a step.

        Args:
            env: the environment.
            playing: lanes to record.
            ended: lanes whose episode ended with this step.
            failed: lanes whose environment was made anew; the episode is dropped.
        """
        try:
            frames: Any = env.render()
        except Exception as error:
            raise EnvironmentFailed(f"the environment cannot be drawn: {type(error).__name__}: {error}") from error
        for lane in playing:
            if lane in failed:
                self._open.pop(lane, None)
                continue
            self._add(lane, frames[lane])
            if lane in ended and lane in self._open:
                episode = self._open.pop(lane)
                episode.end()
                self._done[lane].append(episode)

    def _add(self, lane: int, frame: Array) -> None:
        used = sum(episode.frames for episode in self._done[lane])
        if used + (self._open[lane].frames if lane in self._open else 0) >= self._most:
            self.left_out += 1
            return
        if lane not in self._open:
            self._open[lane] = _Episode(frame, self._rate)
        self._open[lane].add(frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the file, or nothing after an error.

        Raises:
            VideoFailed: it cannot be written.
        """
        try:
            if kind is None:
                self._write()
                os.replace(self._partial, self.path)
        except OSError as problem:
            raise VideoFailed(f"cannot write {self.path}: {problem}") from problem
        finally:
            self._partial.unlink(missing_ok=True)

    def _write(self) -> None:
        import av

        with self._partial.open("wb") as file, av.open(file, "w", format="mp4") as container:
            stream, begin = None, 0
            for episode in (episode for lane in self._done for episode in lane):
                with av.open(episode.file, "r") as piece:
                    source = piece.streams.video[0]
                    stream = stream or container.add_stream_from_template(source)
                    for packet in piece.demux(source):
                        if packet.pts is None or packet.dts is None:  # the demuxer's sign of the end
                            continue
                        packet.stream, packet.pts, packet.dts = stream, packet.pts + begin, packet.dts + begin
                        container.mux(packet)
                    begin += source.duration or 0
                self.frames += episode.frames


class _Episode:
    """One episode, encoded into an mp4 of its own in memory; all are encoded alike, so they can be put together."""

    def __init__(self, frame: Array, rate: Fraction) -> None:
        import av

        self.file, self.frames = BytesIO(), 0
        limit = str(round(rate * _BITS_A_FRAME))
        self._container = av.open(self.file, "w", format="mp4")
        self._stream = self._container.add_stream(
            _CODEC, rate=rate, options={"preset": "veryfast", "crf": "20", "maxrate": limit, "bufsize": limit}
        )
        # H.264 with colours at half resolution, which every player reads, has even sides only.
        self._stream.height, self._stream.width = (max(side - side % 2, 2) for side in frame.shape[:2])
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.max_b_frames = 0  # so that pieces follow each other without a gap
        self._stream.codec_context.thread_count = 1

    def add(self, frame: Array) -> None:
        """Encode a frame, `[height, width, 3]` uint8."""
        from av import VideoFrame

        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self._container.mux(self._stream.encode(picture.reformat(self._stream.width, self._stream.height, "yuv420p")))
        self.frames += 1

    def end(self) -> None:
        """Finish the piece; `file` is ready to be read."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self.file.seek(0)
