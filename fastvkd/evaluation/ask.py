"""The same questions to a model and to the one before it, for people who want to see for themselves.

Answers are greedy, to the prompt that evaluation gives its questions; nothing is scored.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvkd.data.texts import mark_in
from fastvkd.devices import free_memory
from fastvkd.engines.exporting import read_record, settings_of
from fastvkd.errors import DataError, SettingsError, one_line, printable
from fastvkd.evaluation.asker import Asker
from fastvkd.models.answers import Query
from fastvkd.models.folder import local_folder
from fastvkd.models.loading import load_processor
from fastvkd.models.placement import loading_of
from fastvkd.models.processing import special_tokens
from fastvkd.models.prompts import chat_prompt
from fastvkd.options import AskOptions
from fastvkd.photos import decode_image
from fastvkd.records import Photo

Name = str  # "before" or "after"


@dataclass(frozen=True)
class Asked:
    """A question, and by model's name what was answered."""

    question: str
    answers: dict[Name, str]

    def lines(self) -> list[str]:
        """For a terminal, which obeys nothing that a model says."""
        width = max(map(len, self.answers))
        return [printable(self.question), *(f"  {name:{width}}  {printable(a)}" for name, a in self.answers.items())]


class Respondent:
    """One loaded model. Raises FastVKDError where it cannot be loaded."""

    def __init__(self, model: str, processor: Any, options: AskOptions) -> None:
        self._processor, self._length = processor, options.max_new_tokens
        self._model = loading_of(options, local_folder(model)).model(model)

    def answers(self, questions: Sequence[str], photo: Photo | None) -> list[str]:
        refuse_marks_in(questions, self._processor)
        shown = () if photo is None else (photo,)
        queries = [Query(chat_prompt(self._processor, each, image=bool(shown)), shown) for each in questions]
        return Asker(self._model, self._processor).answers(queries, self._length)


def ask(options: AskOptions) -> list[Asked]:
    """Every question's answers, by one model after the other: one is in memory at a time. Raises FastVKDError, for a
    photo or a question before a model is loaded."""
    photo = None if options.photo is None else read_photo(options.photo)
    there = models(options)
    for _, processor in there.values():
        refuse_marks_in(options.question, processor)
    found = {}
    for name, (model, processor) in there.items():
        found[name] = Respondent(model, processor, options).answers(options.question, photo)
        free_memory()  # a model that is spread over memories refers to itself
    return [Asked(question, {name: found[name][i] for name in found}) for i, question in enumerate(options.question)]


def models(options: AskOptions) -> dict[Name, tuple[str, Any]]:
    """What is asked, with its processor, in the order in which answers stand. Both see photos of the same size."""
    names = ({} if options.before is None else {"before": options.before}) | {"after": options.model}
    made_by = settings_of(read_record(local_folder(options.model)))
    max_pixels = options.max_pixels or made_by.get("max_pixels")
    return {name: (model, load_processor(model, max_pixels=max_pixels)) for name, model in names.items()}


def refuse_marks_in(questions: Sequence[str], processor: Any) -> None:
    """Raises SettingsError for a question with one of the model's own marks in it."""
    marks = special_tokens(processor)
    for question in questions:
        if mark := mark_in(question, marks):
            raise SettingsError(f"the question {question!r} holds the model's mark {mark}; leave it out")


def read_photo(path: Path) -> Photo:
    """Raises DataError for a file that cannot be read, or is no photo."""
    try:
        photo = Photo(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); give a photo's file") from error
    decode_image(photo.data, photo.source)
    return photo


def serve(options: AskOptions, opened: Callable[[str], Any] = print) -> None:
    """A page on this machine alone, where one drops a photo and asks, until it is interrupted.

    Both models stay in memory; what is dropped is deleted at the end. `opened` gets the address. Raises SettingsError
    without Gradio, or where the port is taken.
    """
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # which Gradio reads when it is imported
        try:
            import gradio
        except ImportError as error:
            raise SettingsError("--serve needs Gradio: pip install 'fastvkd[ask]'") from error
        page = _page(gradio, {name: Respondent(*told, options) for name, told in models(options).items()})
        try:
            _, address, _ = page.launch(
                server_name="127.0.0.1", server_port=options.port, share=False, quiet=True, prevent_thread_lock=True
            )
        except OSError as error:
            raise SettingsError(f"--port {options.port}: {one_line(error)}; give another") from error
        opened(f"{address} (interrupt to end)")
        try:
            page.block_thread()
        finally:
            page.close()


def _page(gradio: Any, respondents: dict[Name, Respondent]) -> Any:
    """An interface with an answer of each."""

    def answer(file: str | None, question: str) -> Any:
        try:
            photo = None if file is None else read_photo(Path(file))
            answers = [one.answers([question], photo)[0] for one in respondents.values()]
        except (DataError, SettingsError) as refused:
            raise gradio.Error(str(refused)) from refused
        return answers if len(answers) > 1 else answers[0]

    return gradio.Interface(
        answer,
        [
            # without a mode the file arrives as it is, and not in another format
            gradio.Image(type="filepath", image_mode=None, label="Photo", sources=["upload", "clipboard"]),
            gradio.Textbox(label="Question"),
        ],
        [gradio.Textbox(label=name.capitalize()) for name in respondents],
        title="fastvkd ask",
        api_name="ask",
        flagging_mode="never",  # nothing that is shown or said is written down
        analytics_enabled=False,
    )
