"""Studies: a folder per published claim, its trainings, figures and results.

    python -m studies.retrieval.run              # three seeds, the full study
    python -m studies.retrieval.run --quick      # one seed, does it run
    python -m studies.plot retrieval             # its figure again
    python -m studies.all --quick                # all of them; ends with 1 if
                                                 # a claim fails
    python -m studies.report                     # REPORT.md from results.json

To add a study, make `studies/<name>/` with

- `__init__.py`, empty, and `config.py` where no file of configs/ will do;
- `run.py`: a docstring with the command; `jobs(seed, quick)`, a list of
  `Job`s, each one training by train.py and the commands that measure it;
  `measure(job, workdir)`, the dict that those left behind; a line per claim,
  of a figure and its bar, those of `QUICK` being held to with --quick too; and

      accuracy = of('accuracy')
      CLAIMS = {'attention answers': accuracy('full') >= 0.99}
      STUDY = Study(name=…, jobs=jobs, measure=measure, claims=CLAIMS, show=…)
      if __name__ == '__main__':
        main(STUDY)

- `plot.py`: `show(rows, folder)`, which draws results.jsonl into a PNG by
  `longctx.training.figures`, each mechanism as in the other studies, with a
  legend that names all of it and a title that says task and model;
- `README.md`: the figure, what it says and what not, command, commit and
  hardware.

Running it writes `results.jsonl`, one line per training with seed, command,
commit and hardware, and `results.json`, one entry per claim: the median over
seeds, their range, the bar and whether the median meets it. A study is stopped
and started again by the same command. With --quick all files go to
runs/quick/<name>, and only the claims of `QUICK` are checked.
"""
