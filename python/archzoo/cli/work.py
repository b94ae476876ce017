"""`archzoo convert | distill | generate`: commands on folders with weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archzoo.cli.app import console, tokenizer_files, torch_dtype
from archzoo.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]


def convert_command(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder of an attention model (Llama-like).")],
    target: Annotated[str, typer.Argument(help="mla, mamba2, zebra-llama, moe or vocabulary.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    layers: Annotated[
        str | None, typer.Option(help="The MLA layers of zebra-llama, those with experts of moe: 0,5,10.")
    ] = None,
    kv_rank: Annotated[int | None, typer.Option(help="Width of the cached latent.")] = None,
    q_rank: Annotated[int | None, typer.Option(help="Width of the query's latent.")] = None,
    energy: Annotated[float | None, typer.Option(help="Ranks per layer that keep this share of σ².")] = None,
    experts: Annotated[
        int | None, typer.Option(help="moe: copies of each dense feed-forward (default 4).")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="moe: routed experts of a token (default: those of 2 copies).")
    ] = None,
    segments: Annotated[int | None, typer.Option(help="moe: parts that each copy is cut into.")] = None,
    shared: Annotated[int | None, typer.Option(help="moe: segments that are always on.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="vocabulary: the tokenizer.json to change to, such as train_bpe's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what the source does not have.")] = 0,
    device: Device = "cpu",
) -> None:
    """Replace a pretrained model's attention, feed-forwards or vocabulary; `archzoo distill` follows."""
    from archzoo import conversion, costs, zoo

    indices = None if layers is None else _indices(layers)
    if (tokenizer is None) == (target == "vocabulary"):
        raise InputError("--tokenizer goes with the target 'vocabulary', which needs it")
    model = zoo.load(folder, device=device)
    files = tokenizer_files(folder)
    if tokenizer is not None:
        converted = conversion.swap_vocabulary(model, folder / "tokenizer.json", tokenizer)
        files = {"tokenizer.json": tokenizer.read_bytes()}
    else:
        converted = conversion.convert(
            model,
            target,
            layers=indices,
            kv_rank=kv_rank,
            q_rank=q_rank,
            energy=energy,
            experts=experts,
            top_k=top_k,
            segments=segments,
            shared=shared,
            seed=seed,
        )
    zoo.save(converted, out, extra_files=files)
    was, now = (costs.cost(m.config) for m in (model, converted))
    console().print(
        f"{out}: {now.params:,} parameters (was {was.params:,}), {now.cache_bytes_per_token:,} bfloat16 "
        f"cache bytes per token (was {was.cache_bytes_per_token:,})"
    )


def distill_command(
    student: Annotated[Path, typer.Argument(help="Hugging Face folder of the student.")],
    teacher: Annotated[Path, typer.Argument(help="Hugging Face folder of the teacher, same tokenizer.")],
    recipe: Annotated[str, typer.Option(help="TOML file, or the name of one in archzoo's configs/recipes.")],
    out: Annotated[Path, typer.Option(help="Folder for logs, checkpoints and the trained `model`.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text, its last tenth held out (default: the Python manual).")
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(help="Train on this packed folder; of the text only the last tenth is used."),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Run only this stage of the recipe.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights while training.")] = "float32",
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")] = True,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard events.")] = False,
) -> None:
    """Train a student on its teacher, stage by stage; started again, it goes on where it was."""
    from archzoo import zoo
    from archzoo.data import Pack, tokenize_text
    from archzoo.distill import distill, perplexity
    from archzoo.tokenizer import Tokenizer

    plan = read_recipe(recipe)
    train_text, valid_text = texts(text)
    tokenizer = Tokenizer.from_pretrained(teacher)
    pupil, master = (zoo.load(path, dtype=torch_dtype(dtype)) for path in (student, teacher))
    folder = pack or plan.pack
    valid = tokenize_text(tokenizer, valid_text)
    distill(
        pupil,
        master,
        Pack(folder) if folder else tokenize_text(tokenizer, train_text),
        plan.stage(stage) if stage else plan,
        out,
        eval_tokens=valid,
        resume=resume,
        tensorboard=tensorboard,
    )
    zoo.save(pupil, out / "model", extra_files=tokenizer_files(student) or tokenizer_files(teacher))
    seq_len = plan.stages[-1].seq_len
    value, bits = perplexity(pupil, valid, seq_len)
    console().print(f"{out / 'model'}: held-out perplexity {value:.4g} ({bits:.3f} bits per token)")


def generate_command(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder with a tokenizer.json.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue, or a question with --chat.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the folder's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: as stored.")] = None,
    device: Device = "cpu",
) -> None:
    """Continue a prompt; the text appears as it is made."""
    from archzoo import generation, zoo
    from archzoo.tokenizer import TextStream, Tokenizer

    tokenizer = Tokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
    ids = tokenizer.encode(text, add_special_tokens=not chat).tolist()
    model = zoo.load(folder, device=device, dtype=None if dtype is None else torch_dtype(dtype))
    if not chat:
        typer.echo(prompt, nl=False)
    stream = TextStream(tokenizer, skip_special_tokens=True)

    def show(new: Tensor) -> None:
        typer.echo(stream.push(int(new[0])), nl=False)

    generation.generate(
        model,
        [ids],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        callback=show,
    )
    typer.echo(stream.finish())


def read_recipe(name: str) -> Any:
    """A recipe by file, or by its name among those of the package."""
    from archzoo.distill import Recipe
    from archzoo.errors import UnknownNameError
    from archzoo.zoo import CONFIGS

    if name.endswith(".toml"):
        return Recipe.from_toml(name)
    known = {path.stem: path for path in (CONFIGS / "recipes").glob("*.toml")}
    if name not in known:
        raise UnknownNameError("recipe", name, known)
    return Recipe.from_toml(known[name])


def texts(path: Path | None) -> tuple[str, str]:
    """(training, held-out) text: a file with its last tenth held out, or the Python manual."""
    from archzoo.data import python_manual_text, read_text

    if path is None:
        return python_manual_text("train"), python_manual_text("valid")
    text = read_text(path)
    cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
    return text[:cut], text[cut:]


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--layers '{text}': expected numbers with commas between, such as 0,5,10") from None
