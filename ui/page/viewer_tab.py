"""The tab Slide viewer: look at slides, search for a region of one, and see the answer in place."""

from __future__ import annotations

from html import escape

from ...index.store.annotation import LONGEST_LABEL, LONGEST_NOTE
from ...serving.encoders.text import LONGEST
from ..session.session import Session
from .widgets import html

_JS = "histoseek.viewer(element);"
_TEMPLATE = """
<div class="hs-viewer">
  <div class="hs-vbar">
    <label>Slide <input data-part="slide" list="hs-slide-names" placeholder="part of its name"
      autocomplete="off"></label><datalist id="hs-slide-names" data-part="slides"></datalist>
    <span role="group" aria-label="What dragging on the slide does">
      <button type="button" class="hs-tool" data-tool="move" aria-pressed="true">Move</button>
      <button type="button" class="hs-tool" data-tool="box" aria-pressed="false">Box</button>
      <button type="button" class="hs-tool" data-tool="shape" aria-pressed="false">Shape</button>
      <button type="button" class="hs-tool" data-tool="point" aria-pressed="false">Point</button></span>
    <button type="button" class="hs-act" data-part="middle">Search the middle</button>
    <label><input type="checkbox" data-part="elsewhere" checked> other slides only</label>
    <form class="hs-words"{words}><label>Words <input name="words" maxlength="{longest_words}"
      placeholder="lymphocytes" autocomplete="off"></label><button class="hs-act">Search</button></form>
    <label>Layer <select data-part="layer"><option value="none">none</option>{layers}
      <option value="label">labels</option><option value="score">similarity to the search</option>
      <option value="grid">tiles</option><option value="tissue">tissue</option>
      </select></label>
    <label{several}>of <select data-part="clustering">{clusterings}</select></label>
    <label>Opacity <input type="range" data-part="opacity" min="0" max="1" step="0.05" value="0.5"></label>
    <label><input type="checkbox" data-part="marks" checked> annotations</label>
  </div>
  <p class="hs-vnote" role="status">Loading …</p>
  <form class="hs-mark" aria-label="Annotation" hidden>
    <label>Label <input name="label" maxlength="{longest_label}" list="hs-mark-labels" autocomplete="off">
      </label><datalist id="hs-mark-labels"></datalist>
    <label>Note <input name="note" class="hs-wide" maxlength="{longest_note}" autocomplete="off"></label>
    <button class="hs-act hs-change">Save annotation</button>
    <button type="button" class="hs-act" data-part="again" hidden>Search this region</button>
    <button type="button" class="hs-act hs-change" data-part="redraw" hidden>Redraw</button>
    <button type="button" class="hs-act hs-change" data-part="delete" hidden>Delete</button>
    <button type="button" class="hs-act" data-part="close">Close</button>
    <small></small>
  </form>
  <p class="hs-marknote" role="status"></p>
  <div class="hs-vstage" data-tool="move" hidden>
    <div class="hs-panes" data-two="0">{pane}{pane}</div>
    <ul class="hs-legend hs-vlegend" aria-label="Legend of the layer"></ul>
    <button type="button" class="hs-act hs-alone" data-part="alone">Show only the left slide</button>
  </div>
  <ol class="hs-vhits" aria-label="Most similar tiles"></ol>
  <details class="hs-marks" hidden>
    <summary>Annotations of this slide</summary>
    <ul></ul>
    <p><a class="hs-link" download>Save for QuPath (GeoJSON)</a>
      <label class="hs-editors">Add from QuPath <input type="file" accept=".geojson,.json"></label></p>
  </details>
</div>"""
_PANE = """<section class="hs-pane"><h3></h3>
 <div class="hs-slidemap" role="application"
 aria-label="Slide; arrow keys move it, plus and minus zoom"></div>
 <div class="hs-scalebar"></div></section>"""


def viewer_tab(session: Session) -> None:
    """Build the tab."""
    names = session.atlas.clusterings()
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    html(
        html_template=_TEMPLATE.format(
            layers='<option value="cluster">clusters</option>' if names else "",
            clusterings=options,
            several="" if len(names) > 1 else " hidden",
            pane=_PANE,
            words="" if session.takes_text else " hidden",
            longest_words=LONGEST,
            longest_label=LONGEST_LABEL,
            longest_note=LONGEST_NOTE,
        ),
        js_on_load=_JS,
        elem_id="viewer",
    )
