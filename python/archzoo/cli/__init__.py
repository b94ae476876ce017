"""The command line: `archzoo --help`. Each command imports what it needs when it runs."""

from __future__ import annotations

from archzoo.cli.app import app
from archzoo.cli.ckpt import ckpt_app
from archzoo.cli.demo import demo_command
from archzoo.cli.inspect import cost_command, list_command, show_command
from archzoo.cli.pack import pack_command
from archzoo.cli.work import convert_command, distill_command, generate_command

app.command("list")(list_command)
app.command("show")(show_command)
app.command("cost")(cost_command)
app.command("convert")(convert_command)
app.command("distill")(distill_command)
app.command("generate")(generate_command)
app.command("pack")(pack_command)
app.command("demo")(demo_command)
app.add_typer(ckpt_app, name="ckpt")

__all__ = ["app"]
