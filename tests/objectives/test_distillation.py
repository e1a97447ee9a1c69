"""Distillation against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from made import batch, features, unit
from torch import Tensor

from declip.objectives.distillation import Distillation, feature_loss, similarity_loss


def naive_similarity(images: Tensor, texts: Tensor, teacher: tuple[Tensor, Tensor], scale: float, own: float) -> float:
    count, total = len(texts), 0.0
    for view in images:
        for way in range(2):
            for row in range(count):
                student, wise = [], []
                for column in range(count):
                    i, t = (row, column) if way == 0 else (column, row)
                    student.append(scale * float(view[i] @ texts[t]))
                    wise.append(own * float(teacher[0][i] @ teacher[1][t]))
                p, q = (torch.tensor(one, dtype=torch.float64).softmax(0) for one in (wise, student))
                total += float((p * (p / q).log()).sum()) / count / 2
    return total / len(images)


def test_similarities_like_naive() -> None:
    images, texts, teacher = unit(2, 5, 8), unit(5, 8, seed=1), (unit(5, 3, seed=2), unit(5, 3, seed=3))
    found = similarity_loss(images, texts, *teacher, torch.tensor(7.0), 20.0)
    assert float(found) == pytest.approx(naive_similarity(images, texts, teacher, 7.0, 20.0), rel=1e-4)
    assert float(similarity_loss(images[:1], texts, images[0], texts, torch.tensor(20.0), 20.0)) == pytest.approx(
        0, abs=1e-6
    )


def test_features_like_naive() -> None:
    students, teacher = 3 * unit(2, 5, 8), unit(5, 8, seed=1)
    cosines = [float(view[row] @ teacher[row]) / 3 for view in students for row in range(5)]
    assert float(feature_loss(students, teacher)) == pytest.approx(1 - sum(cosines) / 10, rel=1e-5)


def test_what_the_teacher_cannot_read_takes_no_part() -> None:
    students, texts, teacher, wise = unit(1, 5, 8), unit(5, 8, seed=1), unit(5, 3, seed=2), unit(5, 3, seed=3)
    without = [0, 1, 3, 4]
    expected = similarity_loss(
        students[:, without], texts[without], teacher[without], wise[without], torch.tensor(7.0), 20.0
    )
    teacher[2] = float("nan")
    students.requires_grad_()
    found = similarity_loss(students, texts, teacher, wise, torch.tensor(7.0), 20.0)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    found.backward()
    assert students.grad is not None
    assert students.grad.isfinite().all()
    near = feature_loss(students[..., :3], teacher)
    assert float(near) == pytest.approx(float(feature_loss(students[:, without, :3], teacher[without])), rel=1e-5)
    unknown = torch.full_like(teacher, float("nan"))
    assert float(feature_loss(students[..., :3], unknown)) == 0


def test_the_term_maps_to_the_teachers_width() -> None:
    made = features(images=2, batch=5)
    given = replace(batch(), teacher_images=unit(5, 3), teacher_texts=unit(5, 3, seed=1))
    term = Distillation((8, 3), images=1, features=2.0, similarities=0.5, teacher_scale=30.0)
    image = feature_loss(term.image(made.image[:1]), given.teacher_images)  # type: ignore[arg-type]
    text = feature_loss(term.text(made.text["caption"])[None], given.teacher_texts)  # type: ignore[arg-type]
    alike = similarity_loss(
        made.unit_image[:1], made.unit_texts(["caption"])[0], unit(5, 3), unit(5, 3, seed=1), made.logit_scale, 30.0
    )
    assert float(term(made, given)) == pytest.approx(float(image + text + 0.5 * alike), rel=1e-5)
    alone = replace(given, teacher_texts=None)
    assert float(term(made, alone)) == pytest.approx(2 * float(image), rel=1e-5)


def test_the_start_is_compared_as_it_is() -> None:
    made = replace(features(), pooled_image=unit(2, 5, 6), pooled_text={"caption": unit(5, 4)})
    given = replace(batch(), teacher_images=unit(5, 6), teacher_texts=unit(5, 4))
    term = Distillation(None, images=1, features=1.0, similarities=1.0, teacher_scale=1.0)
    assert not list(term.parameters())
    assert float(term(made, given)) == pytest.approx(
        float((1 - F.cosine_similarity(unit(2, 5, 6)[0], unit(5, 6))).mean()) / 2, abs=1e-6
    )
