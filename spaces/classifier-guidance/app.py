"""A page that draws by classifier guidance and annealed Langevin dynamics; `python app.py` serves it."""

from pathlib import Path
from typing import Any

import gradio as gr
import torch
from guided import Guided
from langevin import Langevin
from opening import open_pipelines
from sweep import Sweep

HERE = Path(__file__).resolve().parent
SANS = ("ui-sans-serif", "system-ui", "sans-serif")  # the visitor's own: no font is fetched from elsewhere
MONO = ("ui-monospace", "Consolas", "monospace")
WAITING = 40  # visitors in the queue; the next is told that it is full
SESSIONS = 100  # visitors whose state is kept in memory, more than can be waiting; gradio's own limit is 10,000
HOUR = 3600  # seconds

TITLE = """# Classifier guidance, step by step
A diffusion model that was never told a label draws what a classifier of *noisy* images pulls it towards:

**∇ log p(xₜ | y) = ∇ log p(xₜ) + w ∇ log p(y | xₜ)**"""
GUIDED = """Choose classes and a scale w. Left, the classifier's gradient steers every step; right, the same noise
without it. Below each image: what each classifier makes of it, p(y | xₜ)."""
LANGEVIN = """A score network has learned ∇ log p(x + σ z) at many noise levels σ. Langevin dynamics follows it at the
largest level first, then at ever smaller ones."""
SWEEP = """One noise, one class, many scales: from 0, where the classifier is not asked, to where it has its way."""


def build() -> gr.Blocks:
    """The page."""
    torch.set_num_threads(1)  # a core for each drawing, so that its pixels do not depend on how many cores there are
    models, ncsn = open_pipelines()
    with gr.Blocks(title="Classifier guidance", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown(TITLE, elem_classes="hero")
        notes = [opened.note for opened in (models[models.names[0]], ncsn) if opened.note]
        if notes:
            gr.Markdown("  \n".join(notes), elem_classes="note")
        Guided(models).build("Guidance", GUIDED, "Draw three images, and watch them come out of noise.")
        Langevin(ncsn).build("Langevin", LANGEVIN, "Draw five images, and watch σ fall.")
        Sweep(models).build("Scales", SWEEP, "Draw one image at six scales.")
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def theme() -> gr.themes.Base:
    """Its colours and fonts."""
    soft = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=SANS, font_mono=MONO)
    plain = {"background_fill": "transparent", "padding": "0", "text_color": "*body_text_color"}
    dark = {"background_fill_dark": "transparent", "text_color_dark": "*body_text_color"}
    titles = {f"block_{part}_{name}": value for part in ("title", "label") for name, value in (plain | dark).items()}
    return soft.set(**titles)


def launch_options() -> dict[str, Any]:
    """How it is served: nothing but the page, to nobody but those who come."""
    return {
        "theme": theme(),
        "css_paths": HERE / "style.css",
        "share": False,
        "show_error": False,
        "allowed_paths": [],
        "state_session_capacity": SESSIONS,
        "max_file_size": "16kb",
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "app_kwargs": {"openapi_url": None},
        "run_history": False,
        "footer_links": ["api"],
    }


if __name__ == "__main__":
    build().launch(**launch_options())
