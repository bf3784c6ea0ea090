"""The API's addresses. The hot routes (polls/intake.py) are answered before Django sees them."""

from django.urls import path, re_path
from drf_spectacular.views import SpectacularAPIView, SpectacularRedocView, SpectacularSwaggerView
from rest_framework_simplejwt.views import TokenObtainPairView, TokenRefreshView

from polls.api import errors, views

urlpatterns = [
    path("api/v1/polls", views.PollsView.as_view()),
    path("api/v1/polls/<uuid:poll_id>", views.PollView.as_view()),
    path("api/v1/auth/token", TokenObtainPairView.as_view()),
    path("api/v1/auth/token/refresh", TokenRefreshView.as_view()),
    path("api/schema", SpectacularAPIView.as_view(), name="schema"),
    path("api/docs", SpectacularSwaggerView.as_view(url_name="schema")),
    path("api/redoc", SpectacularRedocView.as_view(url_name="schema")),
    path("problems/<slug:slug>", errors.explain),
    re_path(r"^api(?:/.*)?$", errors.not_found),
]
