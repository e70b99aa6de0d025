"""Routes of a detector's translators: look at them with any token that predicts; change them with the admin token."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse

from tta_serve.access import may_administer, may_predict
from tta_serve.config import Tokens
from tta_serve.detection_service import DetectionService


class TranslatorRoutes:
    """The routes below `/translators`.

    Args:
        service: called at each request, so that the routes can be documented without one.
        tokens: who may do what.
    """

    def __init__(self, service: Callable[[], DetectionService], tokens: Tokens) -> None:
        self.service = service
        self.tokens = tokens

    async def all(self, request: Request) -> JSONResponse:
        """The translators: what they were trained for, and what they have learned since."""
        may_predict(self.tokens, request.headers.get("authorization", ""))
        return JSONResponse({"translators": list(self.service().translators().values())})

    async def put(self, request: Request) -> JSONResponse:
        """Serve this translator for the modality from now on. Admin token."""
        may_administer(self.tokens, request.headers.get("authorization", ""))
        name = request.path_params["modality"]
        return JSONResponse(await self.service().put_translator(name, await request.body()))

    async def delete(self, request: Request) -> JSONResponse:
        """Translate the modality no longer. Admin token."""
        may_administer(self.tokens, request.headers.get("authorization", ""))
        name = request.path_params["modality"]
        await self.service().delete_translator(name)
        return JSONResponse({"deleted": name})
