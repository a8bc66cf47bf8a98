"""Video files: their frames, and the same episodes with and without recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pytest

from actors import policies, video
from actors.environments import specify
from actors.evaluation import run_episodes
from actors.policies import PolicySpec
from actors.video import Video
from replay.errors import ConfigurationError
from replay.types import Array
from tests.actors.toys import TEST_POLICIES


class Painter(gym.Env[Any, Any]):
    """Episodes of 2, 3, 4, ... steps; in a frame, red is the number of the episode and green the step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012
    observation_space = gym.spaces.Discrete(1000)
    action_space = gym.spaces.Discrete(2)

    failures_to_come = 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.episode = render_mode, -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.at = self.episode + 1, 0
        return 0, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.at += 1
        if self.episode == 1 and self.at == 2 and Painter.failures_to_come:
            Painter.failures_to_come -= 1
            raise OSError("the simulator has exited")
        return self.at, 1.0, self.at == self.episode + 2, False, {}

    def render(self) -> Array:  # type: ignore[override]
        frame = np.zeros((49, 65, 3), np.uint8)
        frame[..., 0], frame[..., 1] = 60 * self.episode, 30 * self.at
        return frame


class Odd(Painter):
    """An environment that renders something that is not a frame."""

    def render(self) -> Array:  # type: ignore[override]
        return np.zeros((4, 4))


for kind in (Painter, Odd):
    if f"Squall{kind.__name__}-v0" not in gym.registry:
        gym.register(f"Squall{kind.__name__}-v0", kind)


@pytest.fixture(autouse=True)
def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, policy in TEST_POLICIES.items():
        monkeypatch.setitem(policies.POLICIES, kind, policy)


def record(path: Path, environment: Any, episodes: int, **options: Any) -> tuple[Video, Any]:
    policy = PolicySpec("constant", specify(environment)).build()
    with Video(path) as recording:
        results = run_episodes(policy, episodes, np.random.SeedSequence(3), video=recording, **options)
    assert results == run_episodes(policy, episodes, np.random.SeedSequence(3), **options)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return recording, results


def read(path: Path) -> tuple[Any, Array]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.frames == len(frames)
        assert stream.codec_context.name == "h264"
        return stream.average_rate, frames


def test_every_frame_of_every_episode_is_there_in_order(tmp_path: Path) -> None:
    recording, results = record(tmp_path / "play.mp4", "SquallPainter-v0", 5, lanes=2)
    assert [result.length for result in results] == [2, 3, 4, 2, 3]
    rate, frames = read(tmp_path / "play.mp4")
    assert rate == 12
    assert frames.shape[1:] == (48, 64, 3)
    assert (recording.frames, recording.left_out) == (14 + 5, 0)
    seen = [(round(f[..., 0].mean() / 60), round(f[..., 1].mean() / 30)) for f in frames]
    lanes = [(0, 1, 2), (0, 1)]
    assert seen == [(episode, at) for lane in lanes for episode in lane for at in range(episode + 3)]


def test_a_full_video_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_FRAMES", 10)
    recording, _ = record(tmp_path / "play.mp4", "SquallPainter-v0", 5, lanes=2)
    assert (recording.frames, recording.left_out) == (10, 9)
    assert len(read(tmp_path / "play.mp4")[1]) == 10


def test_an_episode_that_failed_is_not_in_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Painter, "failures_to_come", 1)
    policy = PolicySpec("constant", specify("SquallPainter-v0")).build()
    with Video(tmp_path / "play.mp4") as recording:
        results = run_episodes(policy, 2, np.random.SeedSequence(3), lanes=1, video=recording)
    assert Painter.failures_to_come == 0
    assert recording.frames == len(read(tmp_path / "play.mp4")[1]) == sum(result.length + 1 for result in results)


def test_cart_pole_is_drawn(tmp_path: Path) -> None:
    recording, results = record(tmp_path / "play.mp4", "CartPole-v1", 3)
    rate, frames = read(tmp_path / "play.mp4")
    assert rate == 50
    assert frames.shape == (sum(result.length + 1 for result in results), 400, 600, 3)
    assert recording.frames == len(frames)
    assert np.abs(frames[5].astype(int) - frames[0]).max() > 100


def test_atari_is_recorded_in_color_and_plays_the_game_that_is_scored(tmp_path: Path) -> None:
    environment = specify("ALE/Pong-v5", {"max_num_frames_per_episode": 120})
    record(tmp_path / "play.mp4", environment, 2)
    rate, frames = read(tmp_path / "play.mp4")
    assert rate == 15
    assert frames.shape == (2 * 31, 210, 160, 3)
    assert (frames.max((0, 1, 2)) - frames.min((0, 1, 2)) > 60).all()
    assert np.ptp(frames, axis=-1).max() > 60, "gray"
    assert np.abs(frames[30].astype(int) - frames[10]).max() > 100


def test_the_rendered_screen_shows_what_the_agent_sees() -> None:
    spec = specify("PongNoFrameskip-v4")
    env = spec.make(2, rendered=True)
    try:
        observation, _ = env.reset(seed=np.array([5, 6]))
        for step in range(60):
            observation, *_ = env.step(np.array([step % 6, 3]))
            gray = [frame @ np.array([0.299, 0.587, 0.114]) for frame in env.render()]
            for lane in range(2):
                rows = np.add.reduceat(gray[lane].mean(1), np.arange(0, 210, 5)) / 5
                assert np.abs(rows - observation[lane, -1].reshape(42, 2, 84).mean((1, 2))).max() < 6
    finally:
        env.close()


@pytest.mark.parametrize("name", ["play.avi", "play", "missing/play.mp4", "folder.mp4"])
def test_a_file_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ConfigurationError, match=r"must end in \.mp4|cannot write"), Video(tmp_path / name):
        pytest.fail("the block was entered")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_an_environment_that_renders_no_frame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"SquallOdd-v0 renders ndarray of shape \(4, 4\)"):
        record(tmp_path / "play.mp4", "SquallOdd-v0", 1)
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "play.mp4").write_text("mine")
    with pytest.raises(RuntimeError), Video(tmp_path / "play.mp4"):
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
