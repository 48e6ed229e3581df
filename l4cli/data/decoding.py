"""Decode only what has to be decoded: a film's frames in order, without those nobody waits for.

in: an open PyAV container, the time that is waited for; out: decoded frames with their times

Packets are held back until the time waited for lies in them. When a keyframe at or before that
time comes, all packets before it are dropped unread; when the time is far ahead and the container
has an index, what lies between is skipped altogether.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

HELD_BYTES = 64 << 20  # a film may have one keyframe in hours
SEEK_S = 30.0  # seeking costs about as much as reading so much of a film
_INDEXED = ("mp4", "matroska")


class FilmDecoder:
    """Walks through one stream.

    `wanted_s` is the time waited for, set by whoever takes the frames, and never goes back;
    `end_s` is where the last decoded frame stops being shown.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self.frame_s = float(1 / (stream.average_rate or stream.guessed_rate or 25))
        self.wanted_s = self.end_s = 0.0
        self._zero: int | None = stream.start_time
        self._last_s: float | None = None
        self._converter = VideoReformatter()
        has_index = any(name in container.format.name for name in _INDEXED)
        self._can_seek = has_index and self._zero is not None

    def frames(self) -> Iterator[tuple[Any, float]]:
        """Frames with their times, at least all that matter for the time waited for by then.

        raises: EOFError for a packet of which only a part is there
        """
        held: list[Any] = []
        num_bytes = 0
        is_fed = False  # whether the decoder may hold frames of its own
        for packet in self._packets():
            time_s = self._seconds(packet.pts)
            if packet.is_keyframe and time_s is not None and time_s <= self.wanted_s:
                if is_fed:
                    self.stream.codec_context.flush_buffers()
                held, num_bytes, is_fed = [], 0, False
            held.append(packet)
            num_bytes += packet.size
            due_s = self._seconds(packet.dts if packet.dts is not None else packet.pts)
            if due_s is not None and due_s <= self.wanted_s and num_bytes < HELD_BYTES:
                continue
            for waiting in held:
                yield from self._decode(waiting)
            held, num_bytes, is_fed = [], 0, True

    def rgb(self, frame: Any) -> np.ndarray:
        """A frame's pixels. shapes: -> uint8 [H, W, 3]"""
        # One converter for the whole film: setting one up takes longer than a small frame.
        pixels: np.ndarray = self._converter.reformat(frame, format="rgb24").to_ndarray()
        return pixels

    def _packets(self) -> Iterator[Any]:
        """The stream's packets from a keyframe on, with leaps over what nobody waits for.

        The last is empty: it asks the decoder for what it still holds.
        """
        last_s = sought_s = 0.0  # the newest packet's time; where the last leap led to
        has_leapt, is_at_end = False, False
        while not is_at_end:
            is_at_end, has_begun = True, False
            for packet in self.container.demux(self.stream):
                is_last = packet.size == 0 and packet.pts is None and packet.dts is None
                if packet.size == 0 and not is_last:
                    continue  # the frame before stays on the screen
                time_s = self._seconds(packet.pts)
                if has_leapt and time_s is not None:
                    has_leapt = False
                    # With few keyframes leaps lead back; and where an index is wrong, too far.
                    self._can_seek = last_s < time_s <= sought_s
                    if time_s > sought_s:
                        self._leap_to(0.0)
                        is_at_end = False
                        break
                is_far = time_s is not None and self.wanted_s - time_s > SEEK_S
                if self._can_seek and is_far and self.wanted_s > sought_s:
                    self._leap_to(self.wanted_s)
                    sought_s, has_leapt, is_at_end = self.wanted_s, True, False
                    break
                last_s = last_s if time_s is None else max(last_s, time_s)
                has_begun = has_begun or packet.is_keyframe
                if has_begun:
                    yield packet

    def _leap_to(self, time_s: float) -> None:
        """Go to the keyframe before a time; frames may then be met again."""
        assert self._zero is not None
        offset = self._zero + int(time_s / self.stream.time_base)
        self.container.seek(offset, stream=self.stream)
        self._last_s = None

    def _decode(self, packet: Any) -> Iterator[tuple[Any, float]]:
        # Recordings of broadcasts have holes, and their frames say so themselves.
        if packet.is_corrupt and self.container.format.name != "mpegts":
            raise EOFError("a frame of it is there in part only")
        for frame in packet.decode():
            yield frame, self._time_s(frame)

    def _seconds(self, pts: int | None) -> float | None:
        if pts is None:
            return None
        if self._zero is None:
            self._zero = pts
        return float((pts - self._zero) * self.stream.time_base)

    def _time_s(self, frame: Any) -> float:
        """When a frame appears; where nothing says so, or time runs back, one frame later."""
        time_s = self._seconds(frame.pts)
        if self._last_s is None:
            time_s = time_s or 0.0
        elif time_s is None or time_s <= self._last_s:
            time_s = self._last_s + self.frame_s
        self._last_s = time_s
        lasts = getattr(frame, "duration", None)
        lasts_s = float(lasts * self.stream.time_base) if lasts else self.frame_s
        self.end_s = max(self.end_s, time_s + lasts_s)
        return time_s


def orientation(frame: Any) -> tuple[int, bool]:
    """Quarter turns against the clock, and whether a mirror follows, that make a frame upright."""
    for data in frame.side_data:
        # Older PyAV gives the type as a text.
        if str(data.type).rpartition(".")[2] == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
            is_mirrored = a * d < b * c
            if is_mirrored:
                a = -a
            return round(-math.degrees(math.atan2(b, a)) / 90) % 4, is_mirrored
    return 0, False
