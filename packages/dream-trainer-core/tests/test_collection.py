"""CallbackCollection: attaching, changes while it runs, clean-up, copies."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
from recording import Recorder

from dream_trainer.callbacks import Callback, CallbackCollection, RankZeroCallback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class Notes(Callback[Any]):
    """Appends its name to a shared list in three hooks."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls

    def pre_fit(self) -> None:
        self.calls.append(f"{self.name} pre_fit")

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.calls.append(f"{self.name} {batch_idx}")

    def post_fit(self) -> None:
        self.calls.append(f"{self.name} post_fit")


class Changes(Callback[Any]):
    """Makes a change in a hook, once."""

    def __init__(self, hook: str, change: Any) -> None:
        def once(*args: Any) -> None:
            setattr(self, hook, getattr(super(Changes, self), hook))
            change(self.trainer.callbacks)

        setattr(self, hook, once)


# Attaching


def test_attaching_gives_each_callback_the_trainer(tmp_path: Path) -> None:
    callbacks = [Recorder(), Recorder()]
    trainer = TinyTrainer(tiny_config(tmp_path, callbacks))

    assert all(callback.trainer is trainer for callback in callbacks)


def test_hooks_can_be_called_before_attaching() -> None:
    recorder = Recorder()
    collection = CallbackCollection([recorder])
    collection.post_train_step({}, 3)

    assert recorder.arguments["post_train_step"] == [({}, 3)]


def test_a_collection_can_be_used_by_the_next_trainer(tmp_path: Path) -> None:
    recorder = Recorder()
    config = tiny_config(tmp_path, [recorder], max_steps=1)
    TinyTrainer(config).fit()
    first, recorder.events = recorder.events, []
    trainer = TinyTrainer(config)
    trainer.fit()

    assert recorder.events == first
    assert recorder.trainer is trainer


def test_trainers_that_share_a_collection_attach_it_while_they_run(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Sees(Recorder):
        def record(self, name: str, args: tuple[Any, ...]) -> None:
            seen.append(self.trainer)

    config = tiny_config(tmp_path, [Sees()], max_steps=1)
    first, second = TinyTrainer(config), TinyTrainer(config)
    for work in (first.configure, second.configure, first.setup, second.fit, first.fit):
        seen.clear()
        work()
        assert set(seen) == {second if work == second.fit or work == second.configure else first}


def test_a_collection_assigned_later_is_attached(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = TinyTrainer(tiny_config(tmp_path, max_steps=1))
    trainer.callbacks = CallbackCollection([recorder])
    trainer.fit()

    assert recorder.trainer is trainer
    assert recorder.events[0] == "pre_launch"


@pytest.mark.parametrize("share", ["collection", "callback"])
def test_a_callback_in_use_is_refused_by_another_trainer(tmp_path: Path, share: str) -> None:
    class BuildsAnother(Callback[Any]):
        def pre_train_epoch(self) -> None:
            mine = self.trainer.callbacks
            other = mine if share == "collection" else CallbackCollection([self])
            TinyTrainer(tiny_config(tmp_path, other))

    with pytest.raises(RuntimeError, match=r"BuildsAnother is in use by another.*deepcopy"):
        TinyTrainer(tiny_config(tmp_path, [BuildsAnother()])).fit()


# Changes while it runs


def test_a_callback_that_removes_itself_does_not_skip_the_next(tmp_path: Path) -> None:
    calls: list[str] = []

    class Once(Notes):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            super().post_train_step(result, batch_idx)
            del self.trainer.callbacks["Once"]

    callbacks = [Notes("before", calls), Once("once", calls), Notes("after", calls)]
    TinyTrainer(tiny_config(tmp_path, callbacks, max_steps=2)).fit()

    assert [call for call in calls if "fit" not in call] == [
        "before 0",
        "once 0",
        "after 0",
        "before 1",
        "after 1",
    ]
    assert "once post_fit" not in calls


def test_a_removed_callback_is_still_called_in_that_hook(tmp_path: Path) -> None:
    calls: list[str] = []
    remover = Changes("post_train_step", lambda callbacks: callbacks.pop("Notes"))
    TinyTrainer(tiny_config(tmp_path, [remover, Notes("late", calls)], max_steps=3)).fit()

    assert calls == ["late pre_fit", "late 0"]


def test_an_added_callback_is_called_from_the_next_hook_on(tmp_path: Path) -> None:
    newcomer = Recorder()

    def add(callbacks: CallbackCollection) -> None:
        callbacks.append(newcomer)
        assert newcomer.trainer.callbacks is callbacks

    adder = Changes("pre_train_step", add)
    TinyTrainer(tiny_config(tmp_path, [adder], max_steps=1, val_steps_per_epoch=0)).fit()

    assert newcomer.events[0] == "enter train_context"
    assert newcomer.events[-1] == "post_train_step"


@pytest.mark.parametrize("hook", ["pre_fit", "post_train_step"])
def test_post_fit_of_an_added_callback_needs_its_pre_fit(tmp_path: Path, hook: str) -> None:
    calls: list[str] = []

    class OnlyPostFit(Callback[Any]):
        def post_fit(self) -> None:
            calls.append("only post_fit")

    def add(callbacks: CallbackCollection) -> None:
        callbacks.append(Notes("newcomer", calls))
        callbacks.append(OnlyPostFit())

    trainer = TinyTrainer(tiny_config(tmp_path, [Changes(hook, add)], max_steps=1))
    trainer.fit()

    assert [call for call in calls if call.endswith("fit")] == ["only post_fit"]
    calls.clear()
    trainer.training_parameters.max_steps = 2
    trainer.fit()
    assert calls == ["newcomer pre_fit", "newcomer 1", "newcomer post_fit", "only post_fit"]


def test_replacing_a_callback_takes_effect_from_the_next_hook_on(tmp_path: Path) -> None:
    calls: list[str] = []
    collection = CallbackCollection(
        [
            Changes(
                "post_train_step",
                lambda callbacks: callbacks.update({"it": Notes("new", calls)}),
            ),
            ("it", Notes("old", calls)),
        ]
    )
    TinyTrainer(tiny_config(tmp_path, collection, max_steps=2)).fit()

    assert calls == ["old pre_fit", "old 0", "new 1"]


def test_clearing_the_collection_while_it_runs(tmp_path: Path) -> None:
    calls: list[str] = []
    clearer = Changes("post_train_step", CallbackCollection.clear)
    trainer = TinyTrainer(tiny_config(tmp_path, [clearer, Notes("other", calls)]))
    trainer.fit()

    assert calls == ["other pre_fit", "other 0"]
    assert len(trainer.callbacks) == 0


def test_adding_a_callback_with_unmet_requirements_changes_nothing(tmp_path: Path) -> None:
    class Other(TinyTrainer): ...

    class NeedsOther(Callback[Other]): ...

    trainer = TinyTrainer(tiny_config(tmp_path, [Recorder()]))
    changes: list[Any] = [
        lambda callbacks: callbacks.append(NeedsOther()),
        lambda callbacks: callbacks.update({"x": Recorder(), "y": NeedsOther()}),
        lambda callbacks: callbacks.setdefault("y", NeedsOther()),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="needs a trainer with Other, and TinyTrainer isn't"):
            change(trainer.callbacks)

    assert trainer.callbacks.keys() == ("Recorder",)


def test_a_removed_callback_can_be_freed(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path, [Recorder()], max_steps=1))
    trainer.fit()
    callback = weakref.ref(trainer.callbacks.pop("Recorder"))
    gc.collect()

    assert callback() is None


def test_refresh_finds_a_hook_assigned_later(tmp_path: Path) -> None:
    seen: list[int] = []
    callback: Any = Callback()
    collection = CallbackCollection([callback])
    callback.post_train_step = lambda result, batch_idx: seen.append(batch_idx)
    collection.post_train_step({}, 0)
    collection.refresh()
    collection.post_train_step({}, 1)

    assert seen == [1]


# Rank zero


class RankZeroRecorder(Recorder, RankZeroCallback[Any]): ...


def recorded_on_rank(root: str) -> tuple[list[str], dict[str, tuple[str, ...]], list[str]]:
    plain, rank_zero = Recorder(), RankZeroRecorder()
    trainer = TinyTrainer(tiny_config(root, [plain, rank_zero], max_steps=1))
    trainer.fit()
    assert rank_zero.trainer is trainer
    assert plain.events
    return rank_zero.events, dict(trainer.callbacks.plan().hooks), plain.events


def test_hooks_of_a_rank_zero_callback_run_on_rank_0_alone(tmp_path: Path) -> None:
    zero, one = run_on_ranks(recorded_on_rank, 2, str(tmp_path))

    assert zero[0] == zero[2] == one[2]
    assert one[0] == []
    assert zero[1] == one[1]


# Clean-up


def test_every_callback_cleans_up_and_the_first_error_is_returned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callbacks = [
        Recorder(),
        Recorder(fail_in="post_fit", error=KeyboardInterrupt("one")),
        Recorder(fail_in="post_fit", error=ValueError("two")),
        Recorder(),
    ]
    collection = CallbackCollection(callbacks)
    collection.pre_fit()
    with caplog.at_level(logging.ERROR):
        error = collection.post_fit()

    assert repr(error) == "KeyboardInterrupt('one')"
    assert all(callback.events == ["pre_fit", "post_fit"] for callback in callbacks)
    # Ctrl-C and SystemExit are raised, but not logged as failures.
    assert [record.message for record in caplog.records] == [
        "Recorder_3.post_fit failed during clean-up"
    ]


def test_every_callback_gets_on_exception(caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [Recorder(fail_in="on_exception", error=KeyError()), Recorder()]
    collection = CallbackCollection(callbacks)
    error = ValueError()
    collection.on_exception(error)

    assert all(callback.arguments["on_exception"] == [(error,)] for callback in callbacks)
    assert "Recorder.on_exception failed" in caplog.text


def test_post_fit_is_called_if_pre_fit_ran() -> None:
    callbacks = [Recorder(), Recorder(fail_in="pre_fit"), Recorder()]
    collection = CallbackCollection(callbacks)
    with pytest.raises(ValueError, match="planned"):
        collection.pre_fit()
    collection.post_fit()
    collection.post_fit()

    assert [callback.events.count("post_fit") for callback in callbacks] == [1, 0, 0]


def test_is_fitting_is_true_during_fit() -> None:
    seen: list[bool] = []
    asker = Changes("pre_fit", lambda callbacks: None)
    collection = CallbackCollection([asker])
    asker.pre_fit = lambda: seen.append(collection.is_fitting)  # type: ignore[method-assign]
    collection.refresh()
    seen.append(collection.is_fitting)
    collection.pre_fit()
    collection.post_fit()
    seen.append(collection.is_fitting)

    assert seen == [False, True, False]


# Copies


def copies(collection: CallbackCollection) -> list[CallbackCollection]:
    return [copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))]


def test_copies_keep_names_order_and_unclaimed_states(tmp_path: Path) -> None:
    collection = CallbackCollection({"b": Recorder(), "a": Recorder()})
    with pytest.warns(UserWarning, match="gone will be kept"):
        collection.load_state_dict({"gone": {"n": 1}})
    trainer = TinyTrainer(tiny_config(tmp_path, collection))
    trainer.setup()

    for each in copies(collection):
        assert each.keys() == ("b", "a")
        assert each["a"] is not collection["a"]
        assert not hasattr(each["a"], "trainer")
        assert each.state_dict() == {"gone": {"n": 1}}


def test_a_copy_trains_in_another_trainer_at_the_same_time(tmp_path: Path) -> None:
    class TrainsACopy(Recorder):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.depth = depth

        def pre_train_epoch(self) -> None:
            if self.depth:
                mine = copy.deepcopy(self.trainer.callbacks)
                mine["TrainsACopy"].depth = 0
                TinyTrainer(tiny_config(tmp_path, mine, max_steps=2)).fit()
                self.inner = mine["TrainsACopy"].arguments["post_train_step"]

    callback = TrainsACopy(depth=1)
    TinyTrainer(tiny_config(tmp_path, [callback], max_steps=1)).fit()

    assert len(callback.inner) == 2
    assert len(callback.arguments["post_train_step"]) == 1


def test_a_shallow_copy_shares_callbacks_but_not_changes() -> None:
    collection = CallbackCollection({"a": Recorder()})
    other = copy.copy(collection)
    other["b"] = Recorder()

    assert other["a"] is collection["a"]
    assert collection.keys() == ("a",)
