"""python -m fastattn info | check | demo | tune | hub"""

import importlib
import sys

COMMANDS = {
    "info": "versions, devices, and which backend each of them would use and why",
    "check": "every op against its reference on this machine's devices",
    "demo": "train a small language model on text found here, beside plain PyTorch",
    "tune": "measure block sizes on this machine's GPU, and keep the fastest",
    "hub": "write fastattn as a kernel of Hugging Face's Hub",
}


def usage() -> str:
    """What the commands are."""
    lines = ["usage: python -m fastattn COMMAND [--help]", ""]
    lines += [f"  {name:<7}{what}" for name, what in COMMANDS.items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run one command; the exit code is its own, or 2 if there is no such command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"fastattn: there is no command {name!r}\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(f".commands.{name}", __package__).main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
