"""The API's addresses. The hot routes (polls/intake.py) are answered before Django sees them."""

from django.urls import path, re_path
from drf_spectacular.views import SpectacularAPIView, SpectacularRedocView, SpectacularSwaggerView

from polls.api import errors, views

urlpatterns = [
    path("api/v1/polls", views.PollsView.as_view()),
    path("api/v1/polls/<uuid:poll_id>", views.PollView.as_view()),
    path("api/v1/auth/token", views.SignInView.as_view()),
    path("api/v1/auth/token/refresh", views.RefreshView.as_view()),
    path("api/schema", SpectacularAPIView.as_view(), name="schema"),
    path("api/docs", views.from_this_host_only(SpectacularSwaggerView.as_view(url_name="schema"))),
    path("api/redoc", views.from_this_host_only(SpectacularRedocView.as_view(url_name="schema", template_name="polls/redoc.html"))),
    path("problems/<slug:slug>", errors.explain),
    re_path(r"^api(?:/.*)?$", errors.not_found),
]
