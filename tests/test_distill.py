"""One model teaches another: asked once, unmoved, and refused where it has seen what it must not."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import run as command

from hsi_mamba_nb.cli import main
from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.files import read_rows
from hsi_mamba_nb.learn import Run, compare, few_labels, fit, load
from hsi_mamba_nb.learn.distill import GROUP, Lesson, _seen_by, ask, classifier_of, distill, lesson_options
from hsi_mamba_nb.learn.protocol import board_table, contender
from hsi_mamba_nb.learn.training import batches
from hsi_mamba_nb.models import create_model
from hsi_mamba_nb.scene import Standardizer, split_blocks, split_random, synthetic_scene

QUICK = dict(steps=6, epoch_steps=2, batch_size=16, cpu=True, progress=False)
TEACHERS = {"svm": {}, "cnn-2d": dict(patch=5, width=8), "mamba-hsi": dict(hidden_dim=8, depth=1)}
STUDENTS = {"cnn-1d": dict(width=4), "cnn-2d": dict(patch=3, width=8), "mamba-hsi": dict(hidden_dim=8, depth=1)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scene(): return replace(synthetic_scene(36, 36, bands=12, classes=3, seed=1), name="toy")


@pytest.fixture(scope="module")
def split(scene): return few_labels(split_blocks(scene, buffer=2), scene.labels, 15)


def new(name, scene, **options):
    torch.manual_seed(0)
    return create_model(name, scene.bands, scene.classes, **options)


@pytest.fixture(scope="module")
def teachers(scene, split): return {name: fit(new(name, scene, **o), scene, split, **QUICK) for name, o in TEACHERS.items()}


def student(scene, name="cnn-1d"): return new(name, scene, **STUDENTS[name])


def same(a, b):
    for name, p in a.model.state_dict().items(): assert torch.equal(p, b.model.state_dict()[name]), name
    plain = lambda run: [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    return plain(a) == plain(b)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_an_answer_is_the_pixels_own(teacher, teachers, scene, split):
    said, felt = ask(teachers[teacher], scene, split.train, features=teacher != "svm")
    parts = torch.cat([ask(teachers[teacher], scene, split.train[i:i + 7])[0] for i in range(0, len(split.train), 7)])
    torch.testing.assert_close(parts, said)
    torch.testing.assert_close(ask(teachers[teacher], scene, split.train[::-1].copy())[0].flip(0), said)
    assert said.dtype == torch.float32 and not said.requires_grad and ask(teachers[teacher], scene, split.train[:0])[0].shape == (0, 3)
    if teacher == "cnn-2d": torch.testing.assert_close(teachers[teacher].model.head(felt), said)


@pytest.mark.parametrize("teacher, name, precision", [*((t, s, "no") for t in TEACHERS for s in STUDENTS), *(("cnn-2d", s, "bf16") for s in STUDENTS)])
def test_asked_once_or_always(teacher, name, precision, teachers, scene, split):
    "The same answers make the same student; an image student finds its pixels in its tiles."
    options = dict(features=0. if teacher == "svm" else 1., adaptive=True, temperature=2.)
    once, always = (distill(teachers[teacher], student(scene, name), scene, live=live, precision=precision, **options, **QUICK) for live in (False, True))
    said = [run.train["lesson"].pop("answers") for run in (once, always)]
    assert said[0] and said[1] is None  # what is asked in every step is not known before
    assert same(once, always) and once.train == always.train and once.train["lesson"]["temperature"] == 2
    assert {"loss_ce", "loss_kd"} <= once.history[0].keys() and ("loss_similarity" in once.history[0]) == (teacher != "svm")


def test_many_tiles(scene, split, teachers, monkeypatch):
    "Where tiles overlap, each labelled pixel is matched to its own answer."
    from hsi_mamba_nb.learn import distill as module, feed
    small = lambda *a, **k: feed.feed(*a, **k, tile=16, overlap=6)
    monkeypatch.setattr(module, "feed", small)
    lesson = Lesson(teachers["svm"], student(scene, "mamba-hsi"), scene, split)
    data = small(student(scene, "mamba-hsi"), scene.cube, split.train, scene.labels, Standardizer.fit(scene.cube, split.train))
    assert len(data) > 3
    for t in range(0, len(data), 2):
        index = np.arange(t, min(t + 2, len(data)))
        _, y = data.batch(index)
        places = lesson.where(index, y)
        want = []
        for tile, one in zip(data.used[index], y):
            top, left = data._corner(tile)
            rows, cols = np.nonzero(one.numpy())
            want += [(top + r)*scene.shape[1] + left + c for r, c in zip(rows, cols)]
        assert split.train[places].tolist() == want


def test_the_teacher_stays_as_it_was(teachers, scene, split):
    teacher = teachers["cnn-2d"]
    teacher.model.mix.requires_grad_(False)
    flags, before = [p.requires_grad for p in teacher.model.parameters()], {k: v.clone() for k, v in teacher.model.state_dict().items()}
    teacher.model.zero_grad(set_to_none=True)
    teacher.model.train()  # somebody left it so
    pupils = student(scene), student(scene)  # these are drawn
    drawn = torch.get_rng_state()
    distill(teacher, pupils[0], scene, features=1., **QUICK)
    distill(teacher, pupils[1], scene, live=True, **QUICK)
    assert torch.equal(torch.get_rng_state(), drawn) and not any(m.training for m in teacher.model.modules())
    assert [p.requires_grad for p in teacher.model.parameters()] == flags and all(p.grad is None for p in teacher.model.parameters())
    for k, v in teacher.model.state_dict().items(): assert torch.equal(v, before[k]), k
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in teacher.model.modules())
    teacher.model.mix.requires_grad_(True)


def test_a_teacher_costs_one_pass(teachers, scene, split):
    passed = []
    hook = teachers["cnn-2d"].model.register_forward_hook(lambda module, inputs, output: passed.append(len(inputs[0])))
    distill(teachers["cnn-2d"], student(scene), scene, **QUICK)
    assert sum(passed) == GROUP*-(-len(split.train)//GROUP)
    passed.clear()
    distill(teachers["cnn-2d"], student(scene), scene, live=True, **QUICK)
    hook.remove()
    assert len(passed) == 6 and max(map(len, batches(len(split.train), 16, (0, 0)))) <= GROUP


def test_the_ends_of_lambda(teachers, scene, split):
    labels = scene.labels.copy()
    labels.flat[split.train] = np.roll(labels.flat[split.train], 15)
    at = lambda lam, on=scene, name="cnn-1d": distill(teachers["cnn-2d"], student(scene, name), on, schedule="constant", cap=lam, **QUICK)
    for name in STUDENTS:
        alone = fit(student(scene, name), scene, split, **QUICK)
        same(at(0., name=name), alone)
        with pytest.raises(AssertionError): same(at(.1, name=name), alone)
    same(at(1.), at(1., replace(scene, labels=labels)))
    with pytest.raises(AssertionError): same(at(.9), at(.9, replace(scene, labels=labels)))


def test_one_step_by_hand(teachers, scene, split):
    net, teacher = student(scene).eval(), teachers["svm"]
    lesson = Lesson(teacher, net, scene, split, temperature=3, schedule="linear", calibrated=True)
    from hsi_mamba_nb.learn.feed import feed
    data = feed(net, scene.cube, split.train, scene.labels, Standardizer.fit(scene.cube, split.train))
    index = np.array([40, 2, 21, 7])
    x, y = data.batch(index)
    z, said = net(x), ask(teacher, scene, split.train)[0][index]/lesson.heat
    ce = -z.log_softmax(1).gather(1, y[:, None] - 1).mean()
    q = (said/3).softmax(1)
    kd = 9*(q*(q.log() - (z/3).log_softmax(1))).sum(1).mean()
    loss, terms = lesson.loss(net, x, y, index, .25)
    torch.testing.assert_close(loss, .75*ce + .25*kd)
    torch.testing.assert_close(terms["kd"], kd.detach())
    assert lesson.heat != 1 and lesson.facts["heat"] == lesson.heat and not terms["ce"].requires_grad
    with pytest.raises(AssertionError): torch.testing.assert_close(lesson.loss(net, x, y, np.arange(4), .25)[0], loss)


def test_killed_and_resumed(teachers, scene, split, tmp_path):
    class Killed(Lesson):
        def loss(self, model, x, y, index, share):
            if share >= .5: raise KeyboardInterrupt
            return super().loss(model, x, y, index, share)
    for name in ("cnn-1d", "mamba-hsi"):
        whole, cut = tmp_path/name/"whole", tmp_path/name/"cut"
        distill(teachers["cnn-2d"], student(scene, name), scene, features=1., out=whole, **QUICK)
        lesson = Killed(teachers["cnn-2d"], student(scene, name), scene, split, features=1.)
        with pytest.raises(KeyboardInterrupt): fit(student(scene, name), scene, split, lesson=lesson, out=cut, **QUICK)
        assert (cut/"state.safetensors").is_file() and not (cut/"card.json").exists()
        for other in (dict(features=1., temperature=2.), dict(features=0.)):
            with pytest.raises(InputError, match="was started with lesson"): distill(teachers["cnn-2d"], student(scene, name), scene, out=cut, resume=True, **other, **QUICK)
        with pytest.raises(InputError, match="now lesson=None"): fit(student(scene, name), scene, split, out=cut, resume=True, **QUICK)
        distill(teachers["cnn-2d"], student(scene, name), scene, features=1., out=cut, resume=True, **QUICK)
        assert (whole/"model.safetensors").read_bytes() == (cut/"model.safetensors").read_bytes()
        assert load(cut).train["lesson"]["features"] == 1 and json.loads((cut/"card.json").read_text())["train"]["lesson"]["model"] == "cnn-2d"


def test_a_run_without_a_lesson_is_as_before(scene, split, tmp_path):
    run = fit(student(scene), scene, split, out=tmp_path/"run", **QUICK)
    assert "lesson" not in run.train and list(run.history[0]) == ["epoch", "lr", "loss", "grad_norm", "val_oa", "val_loss", "seconds"]


def test_a_teacher_that_has_seen_the_test_pixels(teachers, scene, split):
    other = split_random(scene, seed=3)
    with pytest.raises(InputError, match="trained or chose the teacher"): distill(teachers["svm"], student(scene), scene, other, **QUICK)
    chose = replace(split, train=split.train[:20], val=split.test[:20], test=split.test[20:])
    judge = fit(new("svm", scene), scene, chose, **QUICK)
    with pytest.raises(InputError, match="^teacher: 20 test pixels"): distill(judge, student(scene), scene, split, **QUICK)
    distill(judge, student(scene), scene, **QUICK)  # on its own split it may
    with pytest.raises(InputError, match="trained or chose"): distill(judge, student(scene), replace(scene, name="another"), split, **QUICK)  # a new name is no new scene
    wide = replace(scene, name="another", cube=scene.cube.astype(np.float64), class_names=scene.class_names)
    with pytest.raises(InputError, match="^teacher: 20 test pixels"): distill(judge, student(scene), wide, split, **QUICK)  # nor is another type
    elsewhere = replace(synthetic_scene(36, 36, bands=12, classes=3, seed=2), name="toy")
    distill(judge, student(scene), elsewhere, few_labels(split_blocks(elsewhere, buffer=2), elsewhere.labels, 15), **QUICK)  # another scene of the same name shares no pixel


def test_where_a_scene_came_from_is_asked_too(teachers, scene):
    def seen(origin, here, cube=scene.cube):
        return len(_seen_by(replace(teachers["svm"], scene=dict(origin=origin)), replace(scene, cube=cube, origin=here)))
    file, other, n = dict(path="/a.npy", key=None, labels=["/x.npy"]), scene.cube[::-1]*2, len(teachers["svm"].split.train) + len(teachers["svm"].split.val)
    assert seen(file, file | dict(labels=None), other) == n  # one file, read in another way
    assert seen(file, dict(path="/b.npy", key=None), other) == seen({}, {}, other) == seen(None, {}, other) == 0 < n == seen(file, dict(path="/b.npy"))
    assert seen(dict(scene="synthetic", seed=1), dict(scene="synthetic", seed=2), other) == 0
    gone = scene.cube.copy()
    gone[np.unravel_index(teachers["svm"].split.train, scene.shape)] = np.nan
    assert seen({}, {}, gone) == 0 and len(_seen_by(teachers["svm"], synthetic_scene(20, 20, bands=12, classes=3, seed=1))) == 0


def test_a_taught_teacher_keeps_to_its_split(teachers, scene, split):
    taught = distill(teachers["mamba-hsi"], student(scene), scene, **QUICK)
    again = distill(taught, student(scene, "cnn-2d"), scene, **QUICK)
    assert again.train["lesson"]["sees_test_spectra"] is True  # what the first one saw, the last one has seen
    with pytest.raises(InputError, match="^teacher: was taught itself"): distill(taught, student(scene), scene, replace(split, val=split.val[1:]), **QUICK)


def test_a_window_wider_than_the_buffer(scene, split):
    free = replace(split, buffer=0)
    broad = fit(new("cnn-2d", scene, patch=7, width=8), scene, free, **QUICK)
    with pytest.raises(InputError, match="^teacher: its patch 7 reaches 3 pixels, the student's split keeps 2 free; split with --buffer 3"): distill(broad, student(scene), scene, split, **QUICK)
    assert distill(broad, student(scene), scene, free, **QUICK).train["lesson"]["sees_test_spectra"] is True


def test_a_lesson_for_other_pixels(teachers, scene, split):
    lesson, other = Lesson(teachers["svm"], student(scene), scene, split), few_labels(split_blocks(scene, buffer=2), scene.labels, 14, seed=1)
    for model, on, its in ((student(scene), scene, other), (student(scene), replace(scene, name="another"), split), (student(scene, "mamba-hsi"), scene, split)):
        with pytest.raises(InputError, match="^lesson: was made for another split, scene or kind of student"): fit(model, on, its, lesson=lesson, **QUICK)


def test_a_teacher_answers_in_full_precision(teachers, scene, split):
    for teacher in teachers.values():
        said, _ = ask(teacher, scene, split.train)
        with torch.autocast("cpu", torch.bfloat16): half, _ = ask(teacher, scene, split.train)
        assert torch.equal(said, half)


def test_the_answers_are_on_the_card(teachers, scene, split):
    facts = lambda cube=scene.cube, **o: Lesson(teachers["cnn-2d"], student(scene), replace(scene, cube=cube), split, **o).facts
    edge = scene.cube.copy()
    place = np.unravel_index(split.train[0], scene.shape)
    edge[place[0], (place[1] + 1) % 36] *= 2  # no training pixel: the teacher's window alone sees it
    one, again, other, felt = facts(), facts(temperature=2.), facts(edge), facts(features=1.)
    assert one["answers"] == again["answers"] and len({one["answers"], other["answers"], felt["answers"]}) == 3 and one["teacher"] == other["teacher"]
    assert not one["left_out"] and Lesson(teachers["svm"], new("css-mamba", scene), scene, split).facts["left_out"] is True


def test_two_warm_ups(teachers, scene, split):
    runs = [distill(teachers["svm"], student(scene), scene, **o, **QUICK) for o in (dict(warmup=.5), dict(lr_warmup=.5))]
    assert [(r.train["warmup"], r.train["lesson"]["warmup"]) for r in runs] == [(.1, .5), (.5, .25)]


def test_a_folder_is_looked_at_before_the_teacher_is_asked(teachers, scene, tmp_path, monkeypatch):
    (tmp_path/"there").mkdir()
    (tmp_path/"there"/"a.txt").write_text("mine")
    monkeypatch.setattr(sys.modules["hsi_mamba_nb.learn.distill"], "ask", None)
    with pytest.raises(InputError, match="exists; use --resume"): distill(teachers["svm"], student(scene), scene, out=tmp_path/"there", **QUICK)


def test_what_does_not_fit(teachers, scene, split):
    one = teachers["cnn-2d"]
    wrong = [(dict(temperature=float("inf")), "finite"), (dict(temperature="4"), "finite number"), (dict(schedule=3), "a word"), (dict(cap=1.5), "from 0 to 1"), (dict(features=True), "finite number"), (dict(calibrated=1), "true or false")]
    for options, words in wrong:
        with pytest.raises(InputError, match=words): lesson_options(**options)
    with pytest.raises(InputError, match="its own teacher"): distill(one, one.model, scene, **QUICK)
    with pytest.raises(InputError, match="knows the classes"): distill(one, student(scene), replace(scene, class_names=("a", "b", "c")), **QUICK)
    with pytest.raises(InputError, match="use features=0"): distill(teachers["svm"], student(scene), scene, features=1., **QUICK)
    with pytest.raises(InputError, match="no lesson can reach it"): fit(new("svm", scene), scene, split, lesson=Lesson(one, student(scene), scene, split), **QUICK)
    model = new("cnn-2d", scene, **TEACHERS["cnn-2d"])
    torch.nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(InputError, match="no finite answer for 45 of 45"): distill(Run(model, one.scale, one.class_names, split), student(scene), scene, **QUICK)


def test_every_network_has_a_classifier(scene):
    from hsi_mamba_nb.models import list_models
    for name in list_models():
        model = create_model(name, 12, 3)
        if not hasattr(model, "learn"): assert model.get_submodule(classifier_of(model)).weight.shape[0] == 3


def test_contenders():
    assert contender("blm@blm:role=teacher@temperature=2:schedule=linear")[:2] == ("blm", "blm:role=teacher")
    for text in ("a@", "@b", "a@b@", "a@b@c@d", "a@b@temperature", "a@b@heat=2", "a@b@cap=2"):
        with pytest.raises(InputError, match="^model "): contender(text)
    for spec, words in (("svm@cnn-1d", "choose a network"), ("cnn-1d@svm@features=1", "use features=0"), ("cnn-1d@swm", "no model 'swm'")):
        with pytest.raises(InputError, match=words): compare([spec], ["hard-few"], seeds=1, budget="2", progress=False)


def test_a_board_with_a_taught_contender(scene, tmp_path):
    out, spec = tmp_path/"b.jsonl", "cnn-1d:width=4"
    names = [spec, f"{spec}@svm", f"{spec}@svm@schedule=constant:cap=0", f"{spec}@cnn-2d:patch=5"]
    what = dict(models=names, scenes=[scene], labels=[5], seeds=2, budget="6", out=out, progress=False)
    rows = {(r["model"], r["seed"]): r for r in compare(**what)}
    text = out.read_text()
    assert compare(**what) == list(rows.values()) and out.read_text() == text and len(read_rows(out)) == 8
    for seed in (0, 1):
        alone, taught, unheard, third = (rows[n, seed] for n in names)
        assert unheard["oa"] == alone["oa"] and unheard["val_oa"] == alone["val_oa"]  # same weights at first, same pixels
        assert taught["teacher"] == "svm" and taught["teacher_val_oa"] > .3 and taught["teacher_seconds"] > 0 and taught["lesson"]["temperature"] == 4
        assert taught["parameters"] == alone["parameters"] and third["teacher_steps"] == 6 and taught["teacher_steps"] is None and "teacher" not in alone
    table = board_table(list(rows.values()))
    assert table.count("its teacher: ") == 3 and f"val OA {np.mean([rows[names[1], s]['teacher_val_oa'] for s in (0, 1)]):.3f}, asked in" in table and "left out" not in table
    wide = compare(["cnn-1d:width=4@cnn-2d:patch=11", "cnn-1d:width=4@mamba-hsi:hidden_dim=8:depth=1"], [scene], ["random"], labels=[5], seeds=1, budget="2", progress=False)
    assert all(r["sees_test_spectra"] for r in wide)  # what the teacher has seen, the student has


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene):
    where = tmp_path_factory.mktemp("taught")
    np.save(where/"cube.npy", scene.cube)
    np.save(where/"labels.npy", scene.labels)
    np.save(where/"less.npy", scene.cube[..., :8])
    np.save(where/"two.npy", np.minimum(scene.labels, 2))
    done = command(*FIT, "--model", "svm", "--buffer", 2, "--out", "teacher", cwd=where)
    assert done.returncode == 0, done.stderr
    return where


FIT = ("fit", "cube.npy", "--labels", "labels.npy", "--epochs", 2, "--cpu")


def test_the_command_line(folder):
    done = command(*FIT, "--model", "cnn-1d", "--teacher", "teacher", "--temperature", 2, "--schedule", "linear", "--adaptive", "--out", "student", cwd=folder)
    assert done.returncode == 0 and "taught by svm in teacher" in done.stdout, done.stderr
    run, teacher = load(folder/"student"), load(folder/"teacher")
    assert run.split.hash == teacher.split.hash and run.train["lesson"]["temperature"] == 2 and run.train["lesson"]["adaptive"] is True
    assert command("evaluate", "student", cwd=folder).returncode == 0


REFUSED = [(("--temperature", 0), "temperature=0.0"), (("--temperature", "nan"), "temperature must be"), (("--schedule", "up"), "no schedule 'up'"), (("--cap", 2), "cap=2.0"), (("--warmup", -1), "warmup=-1.0"),
           (("--features", -1), "features=-1.0"), (("--features", 1), "use features=0"), (("--model", "svm"), "choose a network"), (("--split", "random"), "trained or chose the teacher"),
           (("--teacher", "nowhere"), "no such run folder"), (("--teacher", "cube.npy"), "no such run folder"), (("--temperature", "hot"), "invalid float"), (("--labels", "two.npy"), "knows the classes"),
           (("--out", "teacher", "--overwrite"), "is the teacher's folder"), (("--out", "./teacher/../teacher", "--resume"), "is the teacher's folder"), (("--buffer", 2), "--buffer: the split is the teacher's; add --split"),
           (("--min-per-class", 3), "--min-per-class: the split is the teacher's"), (("--model", "ssa-mamba", "--set", "patch=7"), "split with --buffer 3")]


@pytest.mark.parametrize("options, words", REFUSED)
def test_the_command_line_refuses(options, words, folder):
    done = command(*FIT, "--model", "cnn-1d", "--teacher", "teacher", "--out", "refused", *options, cwd=folder)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not Path(folder/"refused").exists()


def test_the_command_line_resumes(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    go = lambda *options: main([str(v) for v in (*FIT, "--model", "cnn-1d", "--teacher", "teacher", *options)])
    real = Lesson.loss

    def cut(self, model, x, y, index, share):
        if share >= .5: raise KeyboardInterrupt
        return real(self, model, x, y, index, share)
    assert go("--out", "whole") == 0
    with monkeypatch.context() as m:
        m.setattr(Lesson, "loss", cut)
        assert go("--out", "cut") == 130
    assert go("--out", "cut") == 2 and go("--out", "cut", "--resume", "--temperature", 2) == 2 and "was started with lesson.temperature=4" in capsys.readouterr().err
    assert go("--out", "cut", "--resume") == 0 and Path("cut/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_other_bands_and_a_lesson_without_a_teacher(folder):
    done = command("fit", "less.npy", "--labels", "labels.npy", "--cpu", "--model", "cnn-1d", "--teacher", "teacher", "--out", "refused", cwd=folder)
    assert done.returncode == 2 and "has 8 bands" in done.stderr and done.stderr.count("\n") == 1
    for option in (("--temperature", 2), ("--adaptive",), ("--features", 0)):
        done = command(*FIT, *option, "--out", "refused", cwd=folder)
        assert done.returncode == 2 and "name one with --teacher" in done.stderr and done.stderr.count("\n") == 1
    assert not Path(folder/"refused").exists()
