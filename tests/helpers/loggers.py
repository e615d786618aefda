"""Loggers that keep in memory what they are given beside numbers."""

from types import SimpleNamespace

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger


class RecordingWandb(WandbLogger):
    """A WandbLogger that keeps figures, tables, artifacts and settings and never starts wandb.

    Attributes:
        figures: name, step and figures of each call.
        tables: name, step, columns and rows of each call.
        artifacts: all that were logged.
        settings: all hyperparameters.
    """

    def __init__(self, save_dir="."):
        self._folder = str(save_dir)
        self.figures, self.tables, self.artifacts, self.settings = [], [], [], {}

    save_dir = property(lambda self: self._folder)
    name, version = "project", "x1"

    @property
    def experiment(self):
        return SimpleNamespace(log_artifact=self.artifacts.append)

    def log_image(self, key, images, step=None, **kwargs):
        self.figures.append((key, step, images))

    def log_table(self, key, columns=None, data=None, step=None, **kwargs):
        self.tables.append((key, step, columns, data))

    def log_hyperparams(self, params):
        self.settings |= params

    def _nothing(self, *args, **kwargs):
        pass

    log_metrics = after_save_checkpoint = finalize = log_graph = save = _nothing


class RecordingTensorBoard(TensorBoardLogger):
    """A TensorBoardLogger that keeps figures and texts, where TensorBoard is not installed."""

    def __init__(self):
        self.figures, self.texts = [], []

    save_dir = name = version = log_dir = root_dir = None

    @property
    def experiment(self):
        return SimpleNamespace(
            add_figure=lambda name, figure, step: self.figures.append((name, step, [figure])),
            add_text=lambda name, text, step: self.texts.append((name, step, text)),
        )

    def _nothing(self, *args, **kwargs):
        pass

    log_metrics = log_hyperparams = after_save_checkpoint = finalize = log_graph = save = _nothing
