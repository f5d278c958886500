"""Parameters: a query parameter that does not exist, or is there twice, is refused and never ignored."""

from collections.abc import Awaitable, Callable

from fastapi import Request

from app.errors import DuplicateParameter, UnknownParameter, echo


def accept_parameters(*accepted: str) -> Callable[[Request], Awaitable[None]]:
    """Make a dependency that lets these parameters through, each at most once.

    Raises: UnknownParameter, DuplicateParameter.
    """

    async def check(request: Request) -> None:
        names = [name for name, _ in request.query_params.multi_items()]
        for name in names:
            if name not in accepted:
                detail = f"There is no parameter {echo(name)!r}."
                raise UnknownParameter(detail, field=echo(name), accepted=list(accepted))
            if names.count(name) > 1:
                raise DuplicateParameter(f"{name} is there {names.count(name)} times.", field=name)

    return check
