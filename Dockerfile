# One image; its command decides what it is (see docker-compose.yml).
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY requirements.txt .
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir -r requirements.txt

FROM python:3.11-slim-bookworm
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 10001 --no-create-home nexus
WORKDIR /app
COPY --from=build /venv /venv
COPY manage.py .
COPY core core
COPY polls polls
COPY tasks tasks
# The secrets of development suffice to collect files; what runs later has DEBUG off and refuses them.
RUN DEBUG=true python manage.py collectstatic --no-input -v 0
USER 10001
ENV DEBUG=false
EXPOSE 8000
STOPSIGNAL SIGTERM
CMD ["uvicorn", "core.asgi:application", "--host", "0.0.0.0", "--port", "8000", "--loop", "uvloop", "--http", "httptools", "--lifespan", "on", "--no-access-log", "--no-server-header", "--no-proxy-headers", "--timeout-graceful-shutdown", "10"]
