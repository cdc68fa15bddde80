"""`reglue studio`: models in the browser."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from reglue.errors import Stopped, UserError
from reglue.extras import need
from reglue.options.studio import Studio


def studio(options: Studio) -> None:
    """Show the page until Ctrl-C. Raises UserError for what is not there, and Stopped in the end."""
    need("the studio", "gradio")
    from reglue.app.door import password_for
    from reglue.app.workshop import Workshop

    password = password_for(options.host, options.password)
    with TemporaryDirectory(prefix="reglue-studio-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")  # It is read while gradio is imported.
        workshop = Workshop.open(options.runs, folder, options.heads, options.prototypes, options.device)
        warming = Thread(target=workshop.runs[0].warm, daemon=True)
        warming.start()
        from reglue.app.page import serve  # imports gradio, which takes seconds too

        try:
            page = serve(workshop, options.host, options.port, password, options.browser)
            try:
                print(f"studio: {page.local_url} (Ctrl-C ends it)")
                if password and options.password is None:
                    print(f"password: {password} (by any name)")
                sys.stdout.flush()
                while True:
                    time.sleep(3600)
            finally:
                page.close(verbose=False)
        except KeyboardInterrupt:
            raise Stopped("the studio is closed, and its files are removed") from None
        except UserError:
            warming.join()  # A thread of PyTorch's would not let Python end.
            raise
