"""Make the card of a model folder and put the folder on the Hub, or say what that would upload.

    hf-llama3 quickstart
    python examples/publish.py
    python examples/publish.py runs/mine your-name/my-model --license apache-2.0 --push

To push, log in before: `hf auth login`.
"""

import argparse

from hf_llama3.model_card import build_card, publish


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="quickstart/hf", help="Hugging Face folder")
    parser.add_argument("repo_id", nargs="?", default="your-name/quickstart", help="owner/name on the Hub")
    parser.add_argument("--license", help="as the Hub knows it; the folder's own if omitted")
    parser.add_argument("--push", action="store_true", help="upload, rather than say what would be")
    options = parser.parse_args()

    print(build_card(options.folder, options.license))
    report = publish(options.folder, options.repo_id, license=options.license, private=True, dry_run=not options.push)
    for name, size in report.files.items():
        print(f"{size:>12,}  {name}")
    done = "uploaded to" if options.push else "not uploaded (--push does) to"
    print(f"{report.bytes:,} bytes {done} {report.address}")


if __name__ == "__main__":
    main()
