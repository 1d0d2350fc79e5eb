"""Every error that FlashServe raises on purpose.

FlashServeError
├── InputError                   400  the request itself is wrong
│   ├── BodyTooLargeError        413  the request has more bytes than the server takes
│   ├── ContextLengthError       400  prompt and max_tokens do not fit the model's context
│   └── ChatTemplateError        400  chat was asked of a model without a chat template
├── AuthenticationError          401  no key, or a key that is not known
├── ForbiddenError               403  the key, host or origin may not do this
├── ModelNotFoundError           404  no model of that name was deployed
├── ConflictError                409  the name is taken, or the state forbids it now
├── DeployError                  422  a model cannot be served from this source
│   ├── SourceError              422  the source is missing, unreadable or not allowed
│   │   └── SourceUnavailableError 503  the source does not answer now; trying again may help
│   ├── CheckpointError          422  a file of the checkpoint is damaged or contradicts another
│   ├── UnsupportedModelError    422  the architecture needs something that is not served exactly
│   └── ModelTooLargeError       422  larger than the memory that could ever hold it
├── QueueFullError               429  the bounded queue of a model is full
├── UnavailableError             503  cannot be served now; trying again later may help
│   ├── DeadlineError            503  the request waited longer than its deadline
│   ├── DrainingError            503  the server is shutting down
│   └── ReplicaError             503  the replica failed, and so did every retry
│       └── SelfCheckError       503  a woken model computes other results than before
├── CatalogueError               500  the durable catalogue cannot be read or written
├── WireError                    500  a frame or message does not have the agreed form
└── InternalError                500  a fault of our own

Lower layers raise these; the gateway translates them once. Between processes an error travels
as its code and message: see `error_from_code`.
"""

from __future__ import annotations


class FlashServeError(Exception):
    """Base of the tree. `status` is the HTTP status and `code` the stable name."""

    status = 500
    code = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InputError(FlashServeError):
    status = 400
    code = "invalid_request"


class BodyTooLargeError(InputError):
    status = 413
    code = "body_too_large"


class ContextLengthError(InputError):
    code = "context_length_exceeded"


class ChatTemplateError(InputError):
    code = "no_chat_template"


class AuthenticationError(FlashServeError):
    status = 401
    code = "invalid_api_key"


class ForbiddenError(FlashServeError):
    status = 403
    code = "forbidden"


class ModelNotFoundError(FlashServeError):
    status = 404
    code = "model_not_found"


class ConflictError(FlashServeError):
    status = 409
    code = "conflict"


class DeployError(FlashServeError):
    status = 422
    code = "deploy_failed"


class SourceError(DeployError):
    code = "bad_source"


class SourceUnavailableError(SourceError):
    status = 503
    code = "source_unavailable"


class CheckpointError(DeployError):
    code = "bad_checkpoint"


class UnsupportedModelError(DeployError):
    code = "unsupported_model"


class ModelTooLargeError(DeployError):
    code = "model_too_large"


class QueueFullError(FlashServeError):
    status = 429
    code = "queue_full"


class UnavailableError(FlashServeError):
    status = 503
    code = "unavailable"


class DeadlineError(UnavailableError):
    code = "deadline_exceeded"


class DrainingError(UnavailableError):
    code = "draining"


class ReplicaError(UnavailableError):
    code = "replica_failed"


class SelfCheckError(ReplicaError):
    code = "self_check_failed"


class CatalogueError(FlashServeError):
    code = "catalogue_error"


class WireError(FlashServeError):
    code = "wire_error"


class InternalError(FlashServeError):
    code = "internal_error"


def _all_subclasses(cls: type[FlashServeError]) -> list[type[FlashServeError]]:
    return [cls] + [leaf for child in cls.__subclasses__() for leaf in _all_subclasses(child)]


_BY_CODE: dict[str, type[FlashServeError]] = {
    cls.code: cls for cls in reversed(_all_subclasses(FlashServeError)[1:])
}


def error_from_code(
    code: str, message: str, *, retry_after_s: float | None = None
) -> FlashServeError:
    """The error that another process reported as `code` and `message`.

    An unknown code becomes an InternalError, so that a newer peer cannot crash an older one.
    """
    return _BY_CODE.get(code, InternalError)(message, retry_after_s=retry_after_s)
