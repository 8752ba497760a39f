"""Commands that publish a folder: card, push."""

from pathlib import Path
from typing import Annotated

import typer

from hf_llama3.errors import for_terminal, shown

from .app import command
from .options import JsonFlag, LicenseOption
from .printing import print_files, print_json, print_list, print_next, print_table

GROUP = "Publish"


@command("hf-llama3 card runs/shakespeare --license apache-2.0", GROUP)
def card(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    license: LicenseOption = None,
    output: Annotated[Path | None, typer.Option(help="File to write.", show_default="README.md in the folder")] = None,
    only_print: Annotated[bool, typer.Option("--print", help="Print the card, write nothing.")] = False,
):
    """Write the model card of a folder from what its files say; what you wrote in it is kept."""
    from hf_llama3.model_card import build_card, write_card

    content = build_card(folder, license, card=output, progress=True)
    if only_print:
        print(for_terminal(content), end="")
        return
    output = output or folder / "README.md"
    write_card(output, content)
    print(f"Wrote {shown(output)}")
    print_next("push", folder, f"YOUR-NAME/{folder.resolve().name}", "--dry-run")


@command("hf-llama3 push runs/shakespeare my-name/tiny-shakespeare --license apache-2.0 --dry-run", GROUP)
def push(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; it is created if it does not exist.")],
    license: LicenseOption = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to, or a pull request as refs/pr/1.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show what would be uploaded.")] = False,
    as_json: JsonFlag = False,
):
    """Check a folder, write its card and upload the files of the model; the same command resumes an upload."""
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
    report.pop("dry_run")
    print_table(report)
    print_files("\nWould upload" if dry_run else "\nUploaded", files)
    print()
    print_list("Left out", left_out)
    print_list("Note", notes)
    if dry_run:
        print("Nothing was uploaded: a dry run. Log in (hf auth login), then leave out --dry-run.")
    else:
        at = f", revision={report['revision']!r}" if report["revision"] else ""
        trust = ", trust_remote_code=True" if "modeling_llama3.py" in files else ""
        print(f'\nNext: AutoModelForCausalLM.from_pretrained("{repo_id}"{at}{trust})')
