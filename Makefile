# make demo    a fresh clone to pictures of new heads, within 10 minutes on 2 CPU cores; no data, no GPU
# make test    a fresh clone to green tests
# make release  everything that is released, from random weights, on OASIS_DATA in 16 hours of one thread;
#               SMALL=1: the same on the phantom, in minutes
# make report  report.pdf of report.md
# make clean   removes what the demo made

PYTHON ?= python3
VENV := .venv
RUN := ../$(VENV)/bin/python -u ..

.PHONY: demo test report release clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# Everything of the demo lives in demo/, so that it never touches runs of your own. Run twice, it resumes.
demo: $(VENV)/installed
	mkdir -p demo
	cd demo && unset OASIS_DATA && export MPLBACKEND=agg && \
	$(RUN)/stable_diffusion.py --sample --name ../pretrained/stable_diffusion.safetensors --out released && \
	$(RUN)/prestage_train.py --model vqvae --preset demo && \
	$(RUN)/stable_diffusion.py --preset demo && $(RUN)/stable_diffusion.py --sample --brains 2 && \
	$(RUN)/pixelCNN.py --preset demo && $(RUN)/pixelCNN.py --sample --brains 2 && \
	$(RUN)/dataset.py data/phantom && \
	$(RUN)/evaluate.py --reconstruction vqvae --no-floors && \
	$(RUN)/logger.py log
	@echo
	@echo "The demo's pictures:"
	@echo "  a new brain, from the released weights   demo/released/brain_000.png, _scroll.gif, _reslices.png, .nii.gz"
	@echo "  the same in three planes, for a browser         demo/released/index.html"
	@echo "  and what was trained here, on generated heads of 64 px:"
	@echo "  phantom slices                           demo/check_vis/contact_sheet.png"
	@echo "  real | reconstructed | difference        $$(ls demo/vqvae_vis/reconstruction_*.png | tail -1)"
	@echo "  new brains, latent diffusion             demo/diffusion_vis/samples/brain_000.png and brain_001.png"
	@echo "  from noise to brain                      demo/diffusion_vis/samples/process.gif"
	@echo "  new brains, PixelCNN                     demo/pixelcnn_vis/samples/brain_000.png and brain_001.png"
	@echo "  codes filling row by row                 demo/pixelcnn_vis/samples/process.gif"
	@echo "  training curves of the three             demo/log/curves.png"
	@echo "  scores of the first stage                demo/model_ckpt/vqvae/reconstruction_validate.json and .png"

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

report: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r playground/requirements-report.txt
	$(VENV)/bin/python playground/report_pdf.py

# Runs, weights, cards, samples and pictures lie in release/. Run again, it goes on.
release: $(VENV)/installed
	MPLBACKEND=agg $(VENV)/bin/python -u playground/make_release.py release$(if $(SMALL),_small --small)

clean:
	rm -rf demo
