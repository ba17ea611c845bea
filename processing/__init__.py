"""From images and text to model inputs."""

from pathlib import Path

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
