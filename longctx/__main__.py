"""Command lines of longctx: `python -m longctx` lists them."""

import importlib
import sys

# Name -> module of `longctx.cli`, what it does, whether main takes argv[0].
COMMANDS = {
  'generate': ('generate', 'continue a text by a trained model', False),
  'data': ('prepare', 'write a task as a TFDS dataset', False),
  'analysis': ('analyze', 'measure the heads of a trained model', False),
  'plan': ('plan', 'what a config costs on a pod, without the pod', True),
}


def main(argv: list[str]) -> int:
  """Runs the command that is named, or lists them."""
  name, *rest = argv or ['']
  if name not in COMMANDS:
    print('usage: python -m longctx COMMAND ..., each with a --help\n')
    for command, (_, text, _) in COMMANDS.items():
      print(f'  {command:<10}{text}')
    print('\nTraining and evaluation: python train.py, python eval.py')
    return 0 if name in ('', '-h', '--help') else 2
  module, _, takes_name = COMMANDS[name]
  command = importlib.import_module(f'longctx.cli.{module}').main
  return command(argv if takes_name else rest) or 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
