"""Write the dashboard's two generated files: dashboards/dtem-serve.json and docs/dashboard.md."""

import json

from deploy.grafana import dashboard, page


def main() -> None:
    text = dashboard.render()
    dashboard.FILE.write_text(text, encoding="utf-8")
    page.PAGE.write_text(page.render(json.loads(text)), encoding="utf-8")


if __name__ == "__main__":
    main()
