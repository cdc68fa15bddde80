"""The studio: models in the browser. What its tabs do are plain functions, apart from how they look.

| file | |
|---|---|
| `workshop` | what all visitors share: runs, heads, prototypes, one temporary folder |
| `visitor` | what one visitor has: the image at hand, those before it, what was drawn |
| `work` | long work in a thread: it reports, shows what is being drawn, and can be stopped |
| `uploads` | a stranger's image, bounded in bytes and pixels |
| `drawing`, `editing`, `seeing`, `watching` | what the tabs do |
| `door` | passwords, and the size of requests |
| `pictures`, `curves` | images and losses as HTML |
| `tab_*`, `knobs`, `parts`, `page` | how it looks: these alone import gradio |
"""
