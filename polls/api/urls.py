"""The API's addresses. The hot routes (polls/intake.py) are answered before Django sees them."""

from django.urls import path, re_path
from django.views.decorators.csrf import csrf_exempt
from drf_spectacular.views import SpectacularAPIView, SpectacularRedocView, SpectacularSwaggerSplitView

from polls.api import accounts, blocks, cases, clients, codes, errors, integrity, operators, rules, rulings, views
from polls.api.graphql.view import GraphQLView

urlpatterns = [
    path("api/v1/polls", views.PollsView.as_view()),
    path("api/v1/polls/<uuid:poll_id>", views.PollView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/publish", views.PublishView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/open", views.OpenView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/close", views.CloseView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/extend", views.ExtendView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/reopen", views.ReopenView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/archive", views.ArchiveView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/duplicate", views.DuplicateView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/errata", views.ErrataView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/journal", views.JournalView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/history", views.HistoryView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/results", views.ResultsView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/integrity", integrity.IntegrityView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/codes", codes.CodesView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/codes/counts", codes.CountsView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/codes/revoke", codes.RevocationView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/codes/<int:code_id>", codes.CodeView.as_view()),
    path("api/v1/polls/<uuid:poll_id>/rulings", rulings.RulingsView.as_view()),
    path("api/v1/suspicious-ips", cases.CasesView.as_view()),
    path("api/v1/suspicious-ips/<int:case_id>", cases.CaseView.as_view()),
    path("api/v1/suspicious-ips/<int:case_id>/quarantine", cases.QuarantineView.as_view()),
    path("api/v1/suspicious-ips/<int:case_id>/release", cases.ReleaseView.as_view()),
    path("api/v1/suspicious-ips/<int:case_id>/void", cases.VoidView.as_view()),
    path("api/v1/suspicious-ips/<int:case_id>/clear", cases.ClearView.as_view()),
    path("api/v1/suspicious-ips/<int:case_id>/block", cases.CaseBlockView.as_view()),
    path("api/v1/blocks", blocks.BlocksView.as_view()),
    path("api/v1/blocks/<int:block_id>", blocks.BlockView.as_view()),
    path("api/v1/rules", rules.RulesView.as_view()),
    path("api/v1/rules/<str:name>/try", rules.TryView.as_view()),
    path("api/v1/auth/register", accounts.RegisterView.as_view()),
    path("api/v1/auth/token", accounts.SignInView.as_view()),
    path("api/v1/auth/token/refresh", accounts.RefreshView.as_view()),
    path("api/v1/auth/logout", accounts.SignOutView.as_view()),
    path("api/v1/auth/me", accounts.AccountView.as_view()),
    path("api/v1/auth/password", accounts.PasswordView.as_view()),
    path("api/v1/auth/password/reset", accounts.PasswordResetView.as_view()),
    path("api/v1/auth/password/reset/confirm", accounts.PasswordResetConfirmView.as_view()),
    path("api/v1/clients", clients.ClientsView.as_view()),
    path("api/v1/clients/<int:client_id>", clients.ClientView.as_view()),
    path("api/v1/clients/<int:client_id>/rotate", clients.RotateView.as_view()),
    path("api/v1/queues", operators.QueuesView.as_view()),
    path("api/v1/dead-letters", operators.DeadLettersView.as_view()),
    path("api/v1/dead-letters/replay", operators.ReplayView.as_view()),
    path("api/v1/dead-letters/<str:message_id>/replay", operators.ReplayOneView.as_view()),
    re_path(r"^graphql/?$", GraphQLView.as_view()),
    path("api/schema", SpectacularAPIView.as_view(), name="schema"),
    path("api/docs", SpectacularSwaggerSplitView.as_view(url_name="schema", template_name="polls/swagger.html")),
    path("api/redoc", views.styled_by_scripts(SpectacularRedocView.as_view(url_name="schema", template_name="polls/redoc.html"))),
    path("problems/<slug:slug>", errors.explain),
    re_path(r"^api(?:/[\s\S]*)?\Z", csrf_exempt(errors.not_found)),  # else a POST would be told, in HTML, that it lacks a cookie
]
