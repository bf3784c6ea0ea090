# One image; the name of a program decides what it is: docker run nexus web|worker|periodic|beat|flower|setup (see core/__main__.py).
ARG PYTHON=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON} AS build
WORKDIR /build
COPY requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /venv && /venv/bin/pip install --disable-pip-version-check -r requirements.txt && /venv/bin/pip uninstall -y pip setuptools

FROM ${PYTHON}
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin nexus
WORKDIR /app
COPY --from=build /venv /venv
COPY manage.py .
COPY core core
COPY polls polls
COPY tasks tasks
# What is needed at run time is written now: the root file system may be read-only. The secrets of development suffice to collect files;
# what runs later has DEBUG off and refuses them.
RUN python -m compileall -q . && DEBUG=true python manage.py collectstatic --no-input -v 0
USER 10001:10001
# The web server listens for the other containers.
ENV DEBUG=false UVICORN_HOST=0.0.0.0 UVICORN_PORT=8000 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000 9100
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "core"]
CMD ["web"]
