#!/usr/bin/env python3
"""Does bootstrapping help? Trains models on what a run found, with and without captioner and filter, and compares them (BLIP, tables 1 and 4).

    study.py CONFIG --capfilt PROGRAM --out FOLDER [--seeds 5] [--set KEY=VALUE ...]
             [--truth CORPUS/truth.jsonl --queries CORPUS/queries.tsv] [--jobs 2] [--no-plot]

CONFIG is that of a run that begins without models: with [train.med], and a captioner and a filter that start from it. The run gathers, trains
its first models and lets them write and judge captions. Then, for every seed and every arm, a new MED is trained on the arm's texts, for the
same steps from the same kind of start, fine-tuned on what people wrote as a captioner and as a filter, and measured on the held-out pairs:

    {arms}

Each arm is a run of its own in the same store, so whatever is there is not done again: killed and called again, the study goes on. FOLDER gets
study.json, README.md and plot.svg. The truth, if it is given, judges the filter and nothing else.
"""

import argparse
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from glob import glob

# What an arm is trained on: in words, whether that is only what the filter keeps, and whether synthetic texts are in it.
ARMS = {
    "web": ("every text of the web", False, False),
    "filter": ("those that the filter keeps", True, False),
    "captioner": ("every text of the web, and every synthetic one", False, True),
    "both": ("of both kinds those that the filter keeps", True, True),
    "shared": ("the same, by one model that is captioner and filter", True, True),
}
METRICS = ("filter/tr_at_1", "filter/ir_at_1", "filter/tr_at_5", "filter/ir_at_5", "captioner/cider_d", "captioner/rouge_l", "filter/auroc", "filter/auroc_itc")
# Table 1 (14 million images, ViT-B) and table 4 of arXiv 2201.12086: COCO after fine-tuning, TR@1, IR@1, CIDEr.
BLIP = {
    "web": (78.4, 60.7, 127.8),
    "filter": (79.1, 61.5, 128.2),
    "captioner": (79.7, 62.0, 128.9),
    "both": (80.6, 63.1, 129.7),
    "shared": (79.8, 62.2, 129.0),
}
# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Study:
    def __init__(self, args):
        self.args = args
        try:
            with open(args.config, "rb") as file:
                self.config = tomllib.load(file)
        except (OSError, tomllib.TOMLDecodeError) as error:
            sys.exit(f"study: {args.config}: {error}")
        for change in args.set:
            change_setting(self.config, change)
        if "models" in self.config or not {"med", "captioner", "filter"} <= self.config.get("train", {}).keys():
            sys.exit(f"study: {args.config} must name no [models], and have [train.med], [train.captioner] and [train.filter]")
        self.name = self.config["run"]["name"]
        self.store = os.path.join(os.path.dirname(os.path.abspath(args.config)), self.config["run"]["store"])

    def capfilt(self, *changes: str, job: int | None = None) -> None:
        """A run; as one of several at a time it has a working folder and a share of the processors to itself."""
        command = [self.args.capfilt, "run", self.args.config]
        for change in (*self.args.set, "run.rounds=1", *changes):
            command += ["--set", change]
        environment = dict(os.environ)
        if job is not None:
            environment["RAYON_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.args.jobs))
            folder = self.config.get("worker", {}).get("runtime", {}).get("work_dir", "work")
            command += ["--set", f"worker.runtime.work_dir={folder}-{job}"]
        print("study: run", *changes, flush=True)
        # 4: done, though some addresses or tasks were given up
        if subprocess.run(command, env=environment).returncode not in (0, 4):
            sys.exit(f"study: a run failed: {' '.join(command)}")

    def records(self, pattern: str) -> list[dict]:
        found = []
        for path in sorted(glob(f"{self.store}/{pattern}")):
            with open(path, encoding="utf-8") as file:
                found.append(json.load(file))
        return found

    def trained(self, run: str, role: str, among=lambda task: True) -> str:
        """The model that a run has trained last as a role, among some tasks."""
        mine = lambda task: task["params"]["role"] == role and among(task)
        trained = [c for c in self.records("commits/train/*.json") if c["run"] == run and mine(c["task"])]
        if not trained:
            sys.exit(f"study: run {run} has trained no {role}")
        return max(trained, key=lambda c: c["committed_at_ms"])["outputs"][0]["digest"]

    def first_models(self) -> dict:
        """The captioner and the filter that the run trains first."""
        record = f"runs/{self.name}/rounds/*.json"
        if not self.records(record):
            self.capfilt()
        return self.records(record)[0]

    def shared_model(self, med: str) -> str:
        """One model for both: the MED, fine-tuned with all its losses on what people wrote."""
        tuned = self.config["train"]["captioner"]
        name = f"{self.name}-shared"
        self.capfilt(
            f"run.name={name}",
            f"run.dataset={name}",
            f"models.captioner={med}",
            f"models.filter={med}",
            "train.med.init=parent",
            *(f"train.{role}.repeats=1" for role in ("med", "filter")),
            *(f"train.med.{key}={tuned[key]}" for key in ("steps", "peak_lr", "web_weight", "synthetic_weight") if key in tuned),
            # Those that start from it are of no use here.
            *(f"train.{role}.steps=1" for role in ("captioner", "filter")),
            "retrain.min_gain=1e9",
        )
        return self.trained(name, "med", lambda task: task.get("model") == med)

    def second_filter(self) -> dict | None:
        """What the filter that the first round has trained on its dataset makes of the texts; no member of it has seen what it judges."""
        if not self.args.truth:
            return None
        self.capfilt()
        captioner, filter = (self.trained(self.name, role) for role in ("captioner", "filter"))
        name = f"{self.name}-second"
        models = [f"models.captioner={captioner}", f"models.filter={filter}"]
        self.capfilt(f"run.name={name}", f"run.dataset={name}", *models, "retrain.enabled=false")
        return self.judged("second")

    def arm(self, arm: str, seed: int, captioner: str, filter: str, job: int | None) -> dict:
        """Trains one arm and returns what its models reach."""
        name, dataset = f"{self.name}-{arm}-{seed}", f"{self.name}-{arm}"
        _, filtered, synthetic = ARMS[arm]
        self.capfilt(
            f"run.name={name}",
            f"run.dataset={dataset}",
            f"models.captioner={captioner}",
            f"models.filter={filter}",
            *([] if filtered else ["build.policy=itm", "build.min_itm=0.0"]),
            f"train.med.synthetic_weight={float(synthetic)}",
            *(f"train.{role}.{key}=1" for role in ("med", "filter") for key in ("folds", "repeats")),
            *self.args.arm,
            *(f"train.{role}.seed={seed}" for role in ("med", "captioner", "filter")),
            "retrain.min_gain=1e9",
            job=job,
        )
        result = max(self.records(f"runs/{name}/results/*.json"), key=lambda r: r["finished_at_ms"])
        if missing := [metric for metric in METRICS if metric not in result["challenger_metrics"]]:
            sys.exit(f"study: run {name} has not measured {', '.join(missing)} of its new models; `capfilt status` tells what failed")
        version = next(v for v in self.records(f"datasets/{dataset}/*.json") if v["version"] == result["dataset"]["version"])
        texts = {origin: count for origin, count in version["counts"].items() if synthetic or origin != "synthetic"}
        return {"arm": arm, "seed": seed, "texts": texts, "metrics": result["challenger_metrics"]}

    def judged(self, arm: str) -> dict | None:
        """What the filter made of texts whose truth is known."""
        if not self.args.truth:
            return None
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../tests/judge_corpus.py")
        out = os.path.join(self.args.out, f"judged-{arm}.json")
        judge = [sys.executable, script, "--truth", self.args.truth, "--store", self.store, "--queries", self.args.queries]
        if subprocess.run([*judge, "--dataset", f"{self.name}-{arm}", "--json", out]).returncode not in (0, 1):
            sys.exit("study: the filter cannot be judged")
        with open(out, encoding="utf-8") as file:
            numbers = json.load(file)["filter"]
        os.remove(out)
        return numbers

    def run(self) -> dict:
        first = self.first_models()
        second_filter = self.second_filter()
        shared = self.shared_model(self.trained(self.name, "med", lambda task: task.get("model") is None))
        wanted = [(arm, seed) for seed in range(1, self.args.seeds + 1) for arm in ARMS]
        free = queue.SimpleQueue()
        for job in range(self.args.jobs):
            free.put(job if self.args.jobs > 1 else None)

        def one(arm: str, seed: int) -> dict:
            models = (shared, shared) if arm == "shared" else (first["captioner"], first["filter"])
            job = free.get()
            try:
                return self.arm(arm, seed, *models, job)
            finally:
                free.put(job)

        with ThreadPoolExecutor(self.args.jobs) as pool:
            runs = list(pool.map(lambda wanted: one(*wanted), wanted))
        return {
            "about": self.args.about,
            "for_arms": self.args.arm,
            "settings": {section: self.config.get(section, {}) for section in ("build", "train")},
            "runs": runs,
            "arms": {arm: summary(runs, arm) for arm in ARMS},
            "filter_on_known_noise": self.judged("both"),
            "shared_filter_on_known_noise": self.judged("shared"),
            "second_filter_on_known_noise": second_filter,
            "blip": {arm: dict(zip(("tr_at_1", "ir_at_1", "cider"), row)) for arm, row in BLIP.items()},
        }


def change_setting(config: dict, change: str) -> None:
    """As `--set` of capfilt does it: the value is TOML, or text if it is none."""
    path, found, value = change.partition("=")
    if not found:
        sys.exit(f"study: --set {change}: write key=value")
    *folders, last = path.split(".")
    for key in folders:
        config = config[int(key)] if isinstance(config, list) else config.setdefault(key, {})
    try:
        config[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        config[last] = value


def spread(values: list[float]) -> dict:
    """The mean, and how far from it the true one may be with 95 % confidence."""
    count = len(values)
    half = STUDENT[count - 2] * statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    return {"mean": statistics.fmean(values), "ci95": half}


def summary(runs: list[dict], arm: str) -> dict:
    """Each metric of an arm over the seeds, and what it has more than the texts of the web alone, seed by seed."""
    of = lambda name, metric: {run["seed"]: run["metrics"][metric] for run in runs if run["arm"] == name and metric in run["metrics"]}
    out = {}
    for metric in METRICS:
        values, base = of(arm, metric), of("web", metric)
        if gains := [value - base[seed] for seed, value in values.items() if seed in base]:
            out[metric] = spread(list(values.values())) | {"gain": spread(gains)}
    return out


def number(value: dict, sign: str = "") -> str:
    """As the papers write it: hundredfold."""
    half = "" if value["ci95"] is None else f" ± {100 * value['ci95']:.1f}"
    return f"{100 * value['mean']:{sign}.1f}{half}"


def write_page(study: dict, path: str, plot: bool) -> None:
    seeds = len({run["seed"] for run in study["runs"]})
    lines = ["# Does bootstrapping help?", "", f"Made by `scripts/study.py` with {seeds} seeds for each arm. Each arm's models are trained on", ""]
    lines += [f"- **{arm}**: {words}" for arm, (words, *_) in ARMS.items()]
    lines += ["", "and on what people wrote, for the same steps from the same kind of start.", ""]
    lines += [study["about"], ""] if study["about"] else []
    if study["for_arms"]:
        lines += ["Settings of the arms' own: " + ", ".join(f"`{change}`" for change in study["for_arms"]) + ".", ""]
    lines += ["Held-out pairs; R@1 in %, CIDEr-D times 100; means with 95 % confidence over the seeds. The last three columns are BLIP's (COCO).", ""]
    lines += ["| trained on | web texts | synthetic | human | TR@1 | IR@1 | CIDEr-D | BLIP TR@1 | IR@1 | CIDEr |", "|---|---|---|---|---|---|---|---|---|---|"]
    for arm, found in study["arms"].items():
        texts = next(run["texts"] for run in study["runs"] if run["arm"] == arm)
        cells = [arm, *(texts.get(origin, 0) for origin in ("web", "synthetic", "human"))]
        cells += [number(found[m]) if m in found else "–" for m in ("filter/tr_at_1", "filter/ir_at_1", "captioner/cider_d")]
        lines.append("| " + " | ".join(map(str, [*cells, *study["blip"][arm].values()])) + " |")
    lines += ["", "What an arm has more than `web`, seed by seed, hundredfold:", ""]
    lines += ["| trained on | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for arm, found in study["arms"].items():
        if arm != "web":
            lines.append(f"| {arm} | " + " | ".join(number(found[m]["gain"], "+") if m in found else "–" for m in METRICS) + " |")
    lines += ["", "![The arms and their confidence intervals](plot.svg)"] if plot else []
    titles = {"filter": "The filter", "shared_filter": "The shared one", "second_filter": "The filter that the first round trained on its dataset,"}
    for title, key in ((title, f"{name}_on_known_noise") for name, title in titles.items()):
        if numbers := study[key]:
            removed, kept = (f"{numbers[key]:.1%}" for key in ("wrong_removed", "right_kept"))
            found = f"{title} on {numbers['judged']} texts of known truth, {numbers['wrong']} of them wrong"
            lines += ["", f"{found}: {removed} of the wrong ones removed, {kept} of the right ones kept.", ""]
            kinds = numbers["auroc_itm"]
            lines += ["| AUROC | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
            for name in ("itm", "itc"):
                row = numbers[f"auroc_{name}"]
                lines.append(f"| {name.upper()} | " + " | ".join("–" if row[kind] is None else f"{row[kind]:.3f}" for kind in kinds) + " |")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def draw(study: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    from matplotlib import pyplot

    shown = ("filter/tr_at_1", "filter/ir_at_1", "captioner/cider_d")
    figure, axes = pyplot.subplots(1, len(shown), figsize=(11, 3.4), layout="constrained")
    for axis, metric in zip(axes, shown):
        for place, arm in enumerate(ARMS):
            values = [run["metrics"][metric] for run in study["runs"] if run["arm"] == arm and metric in run["metrics"]]
            found = study["arms"][arm].get(metric)
            if found:
                axis.errorbar(place, found["mean"], yerr=found["ci95"], fmt="o", capsize=4, color="C0")
                axis.plot([place + 0.18] * len(values), values, ".", color="0.6", markersize=4)
        axis.set_xticks(range(len(ARMS)), ARMS, rotation=30)
        axis.set_title(metric)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    arms = "\n    ".join(f"{arm:11} {words}" for arm, (words, *_) in ARMS.items())
    parser = argparse.ArgumentParser(description=__doc__.format(arms=arms), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of a run that begins without models")
    parser.add_argument("--capfilt", required=True, help="the program")
    parser.add_argument("--out", required=True, help="where the result goes")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, len(STUDENT) + 2), metavar="N", help="1 to 10; 5 if not given")
    parser.add_argument("--arm", action="append", default=[], metavar="KEY=VALUE", help="changes the config for the models that are compared")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the config, as that of capfilt")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="compared models that are trained at a time; small ones use no more than a processor well")
    parser.add_argument("--truth", help="what is really on the pages; with --queries")
    parser.add_argument("--queries", help="the corpus's queries, for the judge")
    parser.add_argument("--about", metavar="TEXT", help="a sentence for the page: which corpus it was")
    parser.add_argument("--no-plot", action="store_true", help="needs no matplotlib")
    args = parser.parse_args()
    if bool(args.truth) != bool(args.queries):
        parser.error("--truth and --queries go together")
    os.makedirs(args.out, exist_ok=True)
    study = Study(args).run()
    with open(os.path.join(args.out, "study.json"), "w", encoding="utf-8") as file:
        json.dump(study, file, indent=1)
        file.write("\n")
    write_page(study, os.path.join(args.out, "README.md"), not args.no_plot)
    if not args.no_plot:
        draw(study, os.path.join(args.out, "plot.svg"))
    print(f"study: {args.out} has study.json, README.md" + ("" if args.no_plot else " and plot.svg"))


if __name__ == "__main__":
    main()
