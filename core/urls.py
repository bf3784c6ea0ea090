"""What Django serves: everything but the hot routes."""

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from polls.api import errors

urlpatterns = [
    path("", RedirectView.as_view(url="/api/docs")),
    path("favicon.ico", RedirectView.as_view(url="/static/polls/favicon.svg")),
    path("admin/", admin.site.urls),
    path("", include("polls.api.urls")),
]
handler404 = errors.not_found
handler500 = errors.server_error
