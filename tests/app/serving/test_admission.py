import pytest

from app.errors import QueueFull
from app.serving.admission import Admission


def make_admission(max_images: int) -> Admission:
    return Admission(max_images, lambda: 7)


def test_admit_refuses_images_above_the_limit_until_others_leave() -> None:
    admission = make_admission(3)
    with admission.admit(2):
        with pytest.raises(QueueFull), admission.admit(2):
            pass
        with admission.admit(1):
            assert admission.n_images == 3
    assert admission.n_images == 0
    with admission.admit(3):
        assert admission.n_images == 3


def test_admit_releases_images_after_a_failure() -> None:
    admission = make_admission(1)
    with pytest.raises(RuntimeError), admission.admit(1):
        raise RuntimeError
    assert admission.n_images == 0


def test_queue_full_has_a_retry_after() -> None:
    admission = make_admission(10)
    with admission.admit(10), pytest.raises(QueueFull) as caught, admission.admit(1):
        pass
    assert caught.value.headers == {"Retry-After": "7"}
