"""Commands that publish a folder: card, push."""

from pathlib import Path
from typing import Annotated

import typer

from .app import command
from .options import (
    JsonFlag,
)
from .printing import print_json, print_list, print_table


@command("hf-llama3 card runs/shakespeare --license apache-2.0")
def card(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    license: Annotated[str | None, typer.Option(help="As the Hub knows it; the folder's own if omitted.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; standard output if omitted.")] = None,
):
    """Make the model card of a folder from what its files say."""
    from hf_llama3.model_card import build_card, write_card

    content = build_card(folder, license, card=output, progress=True)
    if output is None:
        print(content, end="")
        return
    write_card(output, content)


@command("hf-llama3 push runs/shakespeare my-name/tiny-shakespeare --license apache-2.0 --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made where it does not exist.")],
    license: Annotated[str | None, typer.Option(help="As the Hub knows it; the folder's own if omitted.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, or a pull request as refs/pr/1.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print what would be uploaded.")] = False,
    as_json: JsonFlag = False,
):
    """Check a folder, make its card, and upload what belongs to the model; the same command goes on."""
    from hf_llama3.model_card import publish

    report = publish(
        folder,
        repo_id,
        license=license,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        progress=True,
    ).to_dict()
    if as_json:
        print_json(report)
        return
    files, left_out, notes = report.pop("files"), report.pop("left_out"), report.pop("notes")
    print_table(report)
    for name, size in files.items():
        print(f"{size:>15,}  {name}")
    print_list("Left out", left_out)
    print_list("Note", notes)
    if not dry_run:
        at = f", revision={report['revision']!r}" if report["revision"] else ""
        trust = ", trust_remote_code=True" if "modeling_llama3.py" in files else ""
        print(f'\nAutoModelForCausalLM.from_pretrained("{repo_id}"{at}{trust})')
