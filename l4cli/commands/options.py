"""Options that mean the same everywhere, defined once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Device(StrEnum):
    """Where tensors live; `auto` is cuda where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Json = Annotated[bool, typer.Option("--json", help="JSON lines on stdout")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="only errors and warnings on stderr")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="seed of everything random")]
DeviceOption = Annotated[Device, typer.Option("--device", help="where to compute")]
