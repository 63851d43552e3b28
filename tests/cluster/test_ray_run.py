from __future__ import annotations
from pathlib import Path
from audit.runfolder import RunFolder
from cluster.display import LineDisplay, NoDisplay
from cluster.run import execute
from stub_worker import *
import io, time, sys

def test_x(tmp_path):
    t=time.time()
    out=io.StringIO()
    o=execute(make_job(calibration=3), RunFolder(str(tmp_path/"a")), LineDisplay(out,1))
    print(out.getvalue(), o, time.time()-t)
    f=RunFolder(str(tmp_path/"a"))
    assert rows_of([f.dataset("effects").to_table()])==rows_of([tables(t)["effects"] for t in make_job().stages[2][1]])
    print(f.read_table("layers").to_pandas().T)
    print(f.read_table("noise_floor").to_pandas())
    print(f.manifests()[0])
