import ControlProtocol

extension BenchReport {
  private static let colors = ["#1f6fb2", "#c2571a"]

  /// One page with everything in it: no script, no other file.
  static func page(_ reports: [BenchReport]) -> String {
    """
    <!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/><title>\(reports.first.map { $0.escaped($0.name) } ?? "")</title><style>
    body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em;color:#1a1a1a;background:#fff}
    h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}svg{width:100%;height:auto}table{border-collapse:collapse}
    td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
    pre{background:#f4f4f4;padding:1em;overflow-x:auto}text{font:11px system-ui,sans-serif;fill:#444}
    @media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}pre{background:#222}text{fill:#bbb}td,th{border-color:#444}}
    </style></head><body>
    """ + reports.map(\.section).joined() + "</body></html>\n"
  }

  private var section: String {
    var page = "<h1>\(escaped(name))</h1><p>\(escaped(summary))</p>"
    let chosen = results.enumerated().compactMap { index, runs in middle(runs).map { (index, $0) } }
    for (index, run) in chosen where results.count > 1 || !run.name.isEmpty {
      page +=
        "<p><span style=\"color:\(Self.colors[index])\">&#9632;</span> \(results.count > 1 ? ["A ", "B "][index] : "")<code>\(escaped(run.name))</code></p>"
    }
    page += "<h2>Side by side</h2>" + table(chosen.map(\.1))
    page += "<h2>Latency distribution</h2><p>Share of requests that took longer; both axes logarithmic.</p>"
    page += latencyPlot(chosen.map { ($0.0, $0.1.counts.reads > 0 ? $0.1.reads : $0.1.writes) })
    page += "<h2>Rate over time</h2>" + ratePlot(chosen)
    page += "<h2>All of it</h2><pre>\(escaped(text))</pre>"
    return page
  }

  private func escaped(_ text: String) -> String {
    text.replacing("&", with: "&amp;").replacing("<", with: "&lt;").replacing(">", with: "&gt;").replacing("\"", with: "&quot;")
  }

  private func table(_ runs: [BenchResult]) -> String {
    func row(_ label: String, _ value: (BenchResult) -> String) -> String {
      "<tr><td>\(label)</td>" + runs.map { "<td>\(value($0))</td>" }.joined() + "</tr>"
    }
    func latency(_ run: BenchResult) -> LatencySummary { run.counts.reads > 0 ? run.reads : run.writes }
    var table = "<table><tr><th></th>" + (runs.count > 1 ? "<th>A</th><th>B</th>" : "<th></th>") + "</tr>"
    table += row("requests per second") { Self.rate($0.requestsPerSecond) }
    table += row("bandwidth") { Self.bandwidth($0.bytesPerSecond) }
    for percent in [50.0, 99, 99.9] {
      table += row("latency, \(decimal(percent, percent == 99.9 ? 1 : 0)) %") { Self.time(Double(latency($0).percentile(percent))) }
    }
    table += row("CPU per request, back end") { run in run.backEndCPU.map { Self.time(run.perRequest($0)) } ?? "not visible" }
    table += row("CPU per request, tool") { Self.time($0.perRequest($0.toolCPU)) }
    table += row("kicks per request") { decimal($0.perRequest($0.counts.kicks), 3) }
    table += row("calls per request") { decimal($0.perRequest($0.counts.calls), 3) }
    table += row("system calls per request, back end") { $0.backEndSystemCalls.map { decimal($0, 3) } ?? "not counted" }
    return table + "</table>"
  }

  private static let width = 760.0, height = 300.0, left = 64.0, bottom = 34.0, top = 12.0, right = 12.0

  private func frame(_ marks: String, _ xLabel: String, _ yLabel: String) -> String {
    let (w, h) = (Self.width, Self.height)
    return "<svg viewBox=\"0 0 \(decimal(w, 0)) \(decimal(h, 0))\" role=\"img\">"
      + "<rect x=\"\(Self.left)\" y=\"\(Self.top)\" width=\"\(w - Self.left - Self.right)\" height=\"\(h - Self.top - Self.bottom)\" fill=\"none\" stroke=\"#999\"/>"
      + marks + "<text x=\"\(w / 2)\" y=\"\(h - 4)\" text-anchor=\"middle\">\(xLabel)</text>"
      + "<text x=\"4\" y=\"\(Self.top + 8)\">\(yLabel)</text></svg>"
  }

  private func polyline(_ points: [(Double, Double)], _ color: String) -> String {
    "<polyline fill=\"none\" stroke=\"\(color)\" stroke-width=\"1.6\" points=\""
      + points.map { "\(decimal($0.0, 1)),\(decimal($0.1, 1))" }.joined(separator: " ") + "\"/>"
  }

  private func log10(_ value: Double) -> Double {
    // Base-2 exponent and significand are in the number; the logarithm of the significand by its series.
    guard value > 0 else { return 0 }
    let x = (value.significand - 1) / (value.significand + 1)
    var term = x
    var sum = 0.0
    for odd in stride(from: 1.0, through: 21, by: 2) {
      sum += term / odd
      term *= x * x
    }
    return (Double(value.exponent) * 0.693147180559945 + 2 * sum) / 2.302585092994046
  }

  private func latencyPlot(_ runs: [(Int, LatencySummary)]) -> String {
    let filled = runs.filter { $0.1.count > 0 }
    guard !filled.isEmpty else { return "<p>Nothing completed.</p>" }
    let least = log10(Double(max(1, filled.map(\.1.least).min() ?? 1)))
    let greatest = max(least + 0.5, log10(Double(max(1, filled.map(\.1.greatest).max() ?? 1))))
    let floor = -log10(Double(filled.map(\.1.count).max() ?? 1)) - 0.1
    let plotWidth = Self.width - Self.left - Self.right
    let plotHeight = Self.height - Self.top - Self.bottom
    func x(_ nanoseconds: Double) -> Double { Self.left + (log10(max(1, nanoseconds)) - least) / (greatest - least) * plotWidth }
    func y(_ share: Double) -> Double { Self.top + min(1, log10(max(share, 1e-12)) / floor) * plotHeight }
    var marks = ""
    var tick = 1.0
    while tick < 1e12 {
      if log10(tick) >= least, log10(tick) <= greatest {
        marks +=
          "<line x1=\"\(decimal(x(tick), 1))\" x2=\"\(decimal(x(tick), 1))\" y1=\"\(Self.top)\" y2=\"\(Self.height - Self.bottom)\" stroke=\"#ddd\" stroke-opacity=\".5\"/>"
        marks +=
          "<text x=\"\(decimal(x(tick), 1))\" y=\"\(Self.height - Self.bottom + 14)\" text-anchor=\"middle\">\(Self.time(tick))</text>"
      }
      tick *= 10
    }
    for (share, label) in [(0.5, "50 %"), (0.1, "10 %"), (0.01, "1 %"), (0.001, "0.1 %"), (0.0001, "0.01 %")] where log10(share) >= floor {
      marks +=
        "<line x1=\"\(Self.left)\" x2=\"\(Self.width - Self.right)\" y1=\"\(decimal(y(share), 1))\" y2=\"\(decimal(y(share), 1))\" stroke=\"#ddd\" stroke-opacity=\".5\"/>"
      marks += "<text x=\"\(Self.left - 4)\" y=\"\(decimal(y(share) + 4, 1))\" text-anchor=\"end\">\(label)</text>"
    }
    for (index, summary) in filled {
      var points: [(Double, Double)] = []
      var left = summary.count
      for bucket in summary.buckets {
        points.append((x(Double(max(1, bucket.start))), y(Double(left) / Double(summary.count))))
        left -= bucket.count
      }
      points.append((x(Double(summary.greatest)), Self.height - Self.bottom))
      marks += polyline(points, Self.colors[index % 2])
    }
    return frame(marks, "latency", "")
  }

  private func ratePlot(_ runs: [(Int, BenchResult)]) -> String {
    let greatest = max(1, runs.flatMap(\.1.rates).max() ?? 1) * 1.1
    let longest = max(1, runs.map(\.1.rates.count).max() ?? 1)
    let plotWidth = Self.width - Self.left - Self.right
    let plotHeight = Self.height - Self.top - Self.bottom
    var marks = ""
    for part in 0...4 {
      let value = greatest / 1.1 * Double(part) / 4
      let y = Self.height - Self.bottom - value / greatest * plotHeight
      marks +=
        "<line x1=\"\(Self.left)\" x2=\"\(Self.width - Self.right)\" y1=\"\(decimal(y, 1))\" y2=\"\(decimal(y, 1))\" stroke=\"#ddd\" stroke-opacity=\".5\"/>"
      marks += "<text x=\"\(Self.left - 4)\" y=\"\(decimal(y + 4, 1))\" text-anchor=\"end\">\(Self.rate(value))</text>"
    }
    for (index, run) in runs {
      let points = run.rates.enumerated().map { step, rate in
        (Self.left + (Double(step) + 0.5) / Double(longest) * plotWidth, Self.height - Self.bottom - rate / greatest * plotHeight)
      }
      marks += polyline(points, Self.colors[index % 2])
    }
    let seconds = Double(longest) * Double(runs.first?.1.slice.nanoseconds ?? 0) / 1e9
    return frame(marks, "time, \(decimal(seconds, 1)) s", "")
  }
}
