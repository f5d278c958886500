"""The report of the batching rules: one table."""

from __future__ import annotations

from typing import Any


def tables(content: dict[str, Any]) -> str:
    about = content["about"]
    lines = [
        "| batch | engine | rule | images/s | relative to single images (95 % interval) | GMACs | same tokens % "
        "| same predictions % | largest difference of a logit |",
        "|---:|---|---|" + "---:|" * 6,
    ]
    for row in content["rows"]:
        low, high = row["ratio"]["ci95"]
        lines.append(
            f"| {row['batch']} | {row['engine']} | {row['rule']} | {row['images_per_second']:.0f} "
            f"| {row['ratio']['median']:.2f}× ({low:.2f} … {high:.2f}) | {row['gmacs']:.3f} "
            f"| {100 * row['same_tokens']:.1f} | {100 * row['same_predictions']:.1f} "
            f"| {row['logit_difference']:.1e} |"
        )
    lines += [
        "",
        f"{about['model']}, policy {about['policy']}, {about['n_images']} test images, one thread, FP32, medians of "
        f"{about['rounds']} interleaved rounds. Same tokens, same predictions: share of images that agree with single "
        "images, tokens in every block.",
    ]
    return "\n".join(lines) + "\n"
