"""Names of other frameworks' trainers, and what is written here instead."""

from __future__ import annotations

from collections.abc import Mapping

_LOADERS = "return the loaders from configure_dataloaders"

SYNONYMS: Mapping[str, str] = {
    "configure_model": "configure_models",
    "eval_step": "validation_step",
    "evaluation_step": "validation_step",
    "train_step": "training_step",
    "val_step": "validation_step",
    "valid_step": "validation_step",
    "validate_step": "validation_step",
}
"""Methods by the name that they have here."""

FOREIGN_METHODS: Mapping[str, str] = {
    "configure_callbacks": "pass callbacks to the config: DreamTrainerConfig(callbacks=[…])",
    "configure_gradient_clipping": "set TrainingParameters(gradient_clip_val=…)",
    "lr_scheduler_step": "return LRSchedule(scheduler, interval=…) from configure_schedulers",
    "optimizer_step": "call self.step(optimizer) in training_step; a Callback's "
    "pre_optimizer_step and post_optimizer_step are called around the optimizer's step",
    "optimizer_zero_grad": "self.step(optimizer) zeroes the gradients",
    "predict_dataloader": "pass the loader to predict(loader)",
    "test_dataloader": "return the loaders from configure_test_dataloaders, or call test(loader)",
    "train_dataloader": _LOADERS,
    "transfer_batch_to_device": "write move_batch",
    "val_dataloader": _LOADERS,
}
"""Methods that would never be called, or would hide a property."""

FOREIGN_ATTRIBUTES: Mapping[str, str] = {
    "accelerator": "self.world.device is the device",
    "all_gather": "self.world.all_gather(value)",
    "automatic_optimization": "training_step calls self.backward(loss) and self.step(optimizer)",
    "cuda": "models are moved to self.world.device automatically",
    "device": "self.world.device",
    "eval": "models are put into eval mode for validation; self.model.eval() does it by hand",
    "forward": "call the model: self.model(…)",
    "global_rank": "self.world.rank",
    "hparams": "self.config, a dataclass with fields of your own",
    "is_global_zero": "self.world.is_global_zero",
    "local_rank": "self.world.local_rank",
    "log": 'return {"name": value} from the step, or self.log_scalar("name", value)',
    "logger": "self.log_scalar and the other log_… methods, or a LoggerCallback",
    "loggers": "self.log_scalar and the other log_… methods, or a LoggerCallback",
    "lr_schedulers": "self.named_schedulers(), or the attribute of configure_schedulers",
    "manual_backward": "self.backward(loss)",
    "max_epochs": "self.training_parameters.n_epochs",
    "max_steps": "self.training_parameters.max_steps",
    "num_epochs": "self.training_parameters.n_epochs",
    "num_training_batches": "self.num_train_batches",
    "optimizers": "self.named_optimizers(), or the attribute of configure_optimizers",
    "parameters": "those of a model: self.model.parameters()",
    "named_parameters": "those of a model: self.model.named_parameters()",
    "print": "if self.world.is_global_zero: print(…)",
    "rank": "self.world.rank",
    "save_checkpoint": "add a CheckpointCallback; self.request_save(reason) asks it to save",
    "save_hyperparameters": "self.config, a dataclass with fields of your own",
    "should_stop": "self.stop(reason); self.stop_reason tells whether it was called",
    "to": "models are moved to self.world.device automatically",
    "train": "call fit(); models are put into train mode automatically",
    "trainer": "self: there is no separate trainer",
    "toggle_optimizer": "with self.toggled(optimizer): …",
    "untoggle_optimizer": "with self.toggled(optimizer): …",
    "world_size": "self.world.world_size",
    "zero_grad": "self.step(optimizer) zeroes the gradients",
}
"""Attributes that are read."""

FOREIGN_SWITCHES: Mapping[str, str] = dict.fromkeys(
    ("should_stop", "should_training_stop", "stop_training"),
    "nothing would read it; call stop(reason)",
)
"""Attributes that are assigned."""
