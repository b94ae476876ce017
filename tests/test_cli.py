"""The command line: every command on small models, and errors as one line with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import archzoo
from archzoo import zoo
from archzoo.cli import app
from test_demo import TEXT, write_tiny

COMMANDS = ("list", "show", "cost", "convert", "distill", "generate", "demo")
TEMPLATE = """
{%- for m in messages %}
    {{- '<' + m.role + '>' + m.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>' }}
{%- endif %}"""
RECIPE = """
[[stages]]
name = "kd"
kind = "kd"
steps = 2
seq_len = 16
batch_size = 1
lr = 1e-3
"""


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ok(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*args: object) -> str:
    """The one line of an ArchzooError."""
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = json.dumps({"chat_template": TEMPLATE, "eos_token": "|"}).encode()
    return write_tiny(tmp_path_factory.mktemp("cli") / "model", **{"tokenizer_config.json": settings})


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_says_what_each_command_does(command: tuple[str, ...]) -> None:
    out = ok(*command, "--help")
    assert "Usage" in out
    if not command:
        assert all(f" {name} " in out for name in COMMANDS)


def test_help_needs_no_torch() -> None:
    code = "import sys, archzoo.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_list_shows_names_sizes_and_aliases() -> None:
    out = ok("list", "zebra-llama-3b*")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "is zebra-llama-3b-6mla-22m2" in lines["zebra-llama-3b"]
    assert "3.39 G" in lines["zebra-llama-3b-6mla-22m2"]
    assert "2,304" in lines["zebra-llama-3b-6mla-22m2"]
    assert "6 mla + 22 mamba2" in lines["zebra-llama-3b-6mla-22m2"]
    assert "llama-3.1-8b" not in out


def test_list_has_every_model() -> None:
    out = ok("list")
    assert all(name in out for name in archzoo.list_models())


def test_show_prints_layers_and_costs() -> None:
    out = ok("show", "zebra-llama-3b", "--tokens", 1000, "--batch-size", 2)
    assert "0, 5, 10, 16, 21, 26" in out
    cost = archzoo.cost("zebra-llama-3b", seq_len=1000, batch_size=2)
    assert all(f"{value:,}" in out for value in asdict(cost).values())
    assert "mod" in ok("show", "llama-130m-mod")
    assert "lns" in ok("show", "llama-130m-lns")


def test_cost_as_json_is_the_function(folder: Path) -> None:
    args = ("--seq-len", 100, "--batch-size", 3, "--dtype", "float32", "--json")
    found = json.loads(ok("cost", "zebra-llama-1b", folder, *args))
    expected = asdict(archzoo.cost("zebra-llama-1b", 100, 3, "float32"))
    assert found["zebra-llama-1b"] == expected
    assert found[str(folder)]["params"] == sum(p.numel() for p in archzoo.load(folder).parameters())


def test_cost_compares_and_plots(tmp_path: Path) -> None:
    plot = tmp_path / "new" / "cache.png"
    out = ok("cost", "llama-3.2-3b", "zebra-llama-3b", "--compare", "--plot", plot)
    row = next(line for line in out.splitlines() if "cache bytes per token" in line)
    assert f"{2304 / 114688:.3g}x" in row
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_convert_writes_a_folder_that_loads(folder: Path, tmp_path: Path) -> None:
    out = ok("convert", folder, "zebra-llama", tmp_path / "z", "--layers", "0,3", "--kv-rank", 16)
    assert "cache bytes per token" in out
    kinds = [spec.mixer.kind for spec in archzoo.load(tmp_path / "z").config.specs]
    assert kinds == ["mla", "mamba2", "mamba2"] * 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "z" / name).read_bytes() == (folder / name).read_bytes()


def test_distill_trains_and_writes_the_model(folder: Path, tmp_path: Path) -> None:
    ok("convert", folder, "mamba2", tmp_path / "student")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    args = ("--recipe", tmp_path / "recipe.toml", "--text", tmp_path / "text.txt", "--out", tmp_path / "run")
    assert "held-out perplexity" in ok("distill", tmp_path / "student", folder, *args)
    lines = (tmp_path / "run" / "kd" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    before, after = (
        archzoo.load(path).norm.weight for path in (tmp_path / "student", tmp_path / "run" / "model")
    )
    assert not torch.equal(before, after)
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()


def test_generate_streams_what_generate_returns(folder: Path) -> None:
    model = archzoo.load(folder)
    ids = archzoo.generate(model, [[40, 41, 42]], max_new_tokens=6)  # "IJK"
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids[0].tolist())
    out = ok("generate", folder, "IJK", "--max-new-tokens", 6)
    # Bytes that are no whole character yet are held back at the end of the stream.
    assert text.rstrip("\ufffd").startswith(out.rstrip("\ufffd\n")[:4])
    sampled = ("generate", folder, "IJK", "--temperature", 1.0, "--top-k", 50, "--seed", 3)
    assert ok(*sampled) == ok(*sampled)


def test_chat_uses_the_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr("archzoo.generation.generate", lambda model, ids, *_, **__: seen.extend(ids))
    ok("generate", folder, "hi", "--chat")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(seen[0]) == "<user>hi|<assistant>"


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    assert "did you mean" in fails("show", "zebra-llama-3")
    assert "unknown model" in fails("list", "nothing*")
    assert "dtype 'int3'" in fails("cost", "llama-130m", "--dtype", "int3")
    assert "needs `layers`" in fails("convert", folder, "zebra-llama", tmp_path / "x")
    assert "--layers 'a'" in fails("convert", folder, "zebra-llama", tmp_path / "x", "--layers", "a")
    assert "conversion target" in fails("convert", folder, "rnn", tmp_path / "x")
    assert "no such folder" in fails("convert", tmp_path / "none", "mla", tmp_path / "x")
    assert "tokenizer.json" in fails("generate", tmp_path, "hi")
    assert "dtype 'int3'" in fails("generate", folder, "hi", "--dtype", "int3")
    assert "unknown recipe" in fails("distill", folder, folder, "--recipe", "none", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_chat_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert "no chat template" in fails("generate", tmp_path, "hi", "--chat")


def test_a_process_ends_with_code_2_and_no_traceback() -> None:
    command = [sys.executable, "-c", "from archzoo.cli import app; app()", "show", "zebra-llama-3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("unknown model 'zebra-llama-3'; did you mean ")
    assert done.stderr.count("\n") == 1


README = Path(__file__).parent.parent / "README.md"


def test_readme_table_is_the_registry() -> None:
    rows = [
        line.split(" | ") for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    found = {row[0].removeprefix("| "): row[1:4] for row in rows if len(row) == 5 and row[0] != "| model"}
    costs = {name: archzoo.cost(name) for name in archzoo.list_models() if name not in zoo.aliases()}
    wanted = {
        name: [f"{c.params:,}", f"{c.active_params:,}", f"{c.cache_bytes_per_token:,}"]
        for name, c in costs.items()
    }
    assert found == wanted


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = README.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert (tmp_path / "out" / "config.json").exists()
