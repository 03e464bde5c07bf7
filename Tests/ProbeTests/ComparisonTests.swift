import Foundation
import FoundationXML
import TestSupport
import Testing

/// Runs of several back ends in turn, beside the machine's own limits, and the page about them.
@Suite("Probe: comparisons and pages")
struct ComparisonTests {
  private static func scratch() throws -> String {
    let path = NSTemporaryDirectory() + "probe-comparison-\(UUID().uuidString.prefix(8))"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    return path
  }

  private static func bench(_ words: [String], _ backEnd: [String]) throws -> (result: ProgramResult, json: [String: Any]) {
    let common = ["bench", "--output-format", "json", "--no-syscalls", "--runtime", "0.2", "--ramp-time", "0.05", "--timeout", "20"]
    let result = try RunningProgram(BuiltPrograms.path("martlet-probe"), common + words + ["--"] + backEnd).wait(seconds: 120)
    return (result, try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any] ?? [:])
  }

  private static func rates(_ json: [String: Any], _ name: String) -> [Double] {
    (json["jobs"] as? [[String: Any]] ?? []).filter { $0["jobname"] as? String == name }.compactMap {
      ($0["martlet"] as? [String: Any])?["requests_per_s"] as? Double
    }
  }

  private static func median(_ values: [Double]) -> Double {
    let sorted = values.sorted()
    return (sorted[(sorted.count - 1) / 2] + sorted[sorted.count / 2]) / 2
  }

  @Test("Two back ends run A B B A in every round; the ratio is the median of neighbours, with its spread")
  func order() throws {
    let place = try Self.scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    // Given a socket each is started anew for every run, which is how the order shows.
    func command(_ name: String) throws -> [String] {
      #expect(FileManager.default.createFile(atPath: "\(place)/\(name).raw", contents: Data(count: 2 << 20)))
      let program = BuiltPrograms.path("martlet-block")
      return ["/bin/sh", "-c", "echo \(name) >>\(place)/order; exec \(program) --fd=3 --blk-file=\(place)/\(name).raw", "{fd}"]
    }
    let other = try command("B").map { "'\($0)'" }.joined(separator: " ")
    let (result, json) = try Self.bench(["--type", "blk", "--rounds", "2", "--vs", other], try command("A"))
    #expect(result.code == 0, "\(result.errors)")
    let started = try String(contentsOfFile: place + "/order", encoding: .utf8).split(separator: "\n").joined()
    #expect(started == "ABBAABBA")
    let (a, b) = (Self.rates(json, "probe-A"), Self.rates(json, "probe-B"))
    #expect(a.count == 4 && b.count == 4)
    let ratios = zip(a, b).map { $0 / $1 }
    let comparison = try #require(json["comparison"] as? [String: Any])
    #expect(comparison["pairs"] as? Int == 4)
    for (name, value) in [
      ("ratio_median", Self.median(ratios)), ("ratio_min", ratios.min() ?? 0), ("ratio_max", ratios.max() ?? 0),
    ] {
      let told = try #require(comparison[name] as? Double)
      #expect(abs(told - value) < 1e-3 * value, "\(name) is \(told) instead of \(value)")
    }
  }

  @Test("The machine's limits are measured in every round, and io_uring on the file that is named")
  func limits() throws {
    let place = try Self.scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    let file = place + "/file"
    #expect(FileManager.default.createFile(atPath: file, contents: Data(count: 1 << 20)))
    let backEnd = [BuiltPrograms.path("broken-backend"), "{socket}", "block"]
    let (result, json) = try Self.bench(["--type", "blk", "--rounds", "2", "--limit-file", file], backEnd)
    #expect(result.code == 0, "\(result.errors)")
    #expect(Self.rates(json, "probe").count == 2)
    let limits = try #require(json["limits"] as? [[String: Any]])
    #expect(limits.count == 2)
    for limit in limits {
      for name in ["io_uring_iops", "copies_per_s", "eventfd_round_trips_per_s"] {
        #expect((limit[name] as? Double ?? 0) > 10, "\(name) is \(limit[name] ?? "missing")")
      }
    }
    let words = ["bench", "--no-syscalls", "--runtime", "0.1", "--rounds", "1", "--limit", "--"] + backEnd
    let text = try RunningProgram(BuiltPrograms.path("martlet-probe"), words).wait(seconds: 120).output
    #expect(text.contains("Limits of the machine") && text.contains("eventfd round trip") && text.contains("copy of one block"), "\(text)")
    #expect(!text.contains("io_uring"), "No file was named: \(text)")
  }

  /// Elements and attributes of a page.
  private final class Reader: NSObject, XMLParserDelegate {
    var counts: [String: Int] = [:]
    var attributes: [(element: String, name: String, value: String)] = []
    var cells: [String] = []
    private var text = ""

    func parser(
      _ parser: XMLParser, didStartElement name: String, namespaceURI: String?, qualifiedName: String?, attributes list: [String: String]
    ) {
      counts[name, default: 0] += 1
      for (key, value) in list { attributes.append((name, key, value)) }
      text = ""
    }

    func parser(_ parser: XMLParser, foundCharacters string: String) { text += string }

    func parser(_ parser: XMLParser, didEndElement name: String, namespaceURI: String?, qualifiedName: String?) {
      if name == "td" || name == "h1" { cells.append(text) }
    }
  }

  private static func rate(_ value: Double) -> String {
    value >= 1e6
      ? String(format: "%.2f M/s", value / 1e6) : value >= 1e3 ? String(format: "%.1f k/s", value / 1e3) : String(format: "%.1f /s", value)
  }

  private static func time(_ value: Double) -> String {
    value >= 1e9
      ? String(format: "%.2f s", value / 1e9)
      : value >= 1e6
        ? String(format: "%.2f ms", value / 1e6)
        : value >= 1e3 ? String(format: "%.2f µs", value / 1e3) : String(format: "%.0f ns", value)
  }

  @Test("A page is whole in itself, well-formed, has its plots, and says what the JSON says")
  func page() throws {
    let place = try Self.scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    let program = BuiltPrograms.path("broken-backend")
    let words = ["--rounds", "1", "--name", "a<b> & \"c\"", "--html", place + "/page.html", "--vs", "\(program) {socket} block"]
    let (result, json) = try Self.bench(["--type", "blk"] + words, [program, "{socket}", "block"])
    #expect(result.code == 0, "\(result.errors)")
    let page = try #require(FileManager.default.contents(atPath: place + "/page.html"))
    let text = String(decoding: page, as: UTF8.self)
    for reference in ["http:", "https:", "url(", "@import", "javascript:"] { #expect(!text.contains(reference), "\(reference)") }

    let reader = Reader()
    let parser = XMLParser(data: page)
    parser.delegate = reader
    #expect(parser.parse(), "line \(parser.lineNumber): \(String(describing: parser.parserError))")
    for element in ["script", "link", "img", "iframe", "object", "embed", "image", "use", "a"] {
      #expect(reader.counts[element] == nil, "<\(element)>")
    }
    #expect(!reader.attributes.contains { ["src", "href", "xlink:href", "data", "srcset", "background"].contains($0.name) })
    #expect(reader.cells.contains("a<b> & \"c\""))

    // Latency and rate, a line each for A and B, all of it inside the picture.
    #expect(reader.counts["svg"] == 2)
    let lines = reader.attributes.filter { $0.element == "polyline" && $0.name == "points" }.map(\.value)
    #expect(lines.count == 4)
    for line in lines {
      let points = line.split(separator: " ").map { $0.split(separator: ",").compactMap { Double($0) } }
      #expect(points.count > 0 && points.allSatisfy { $0.count == 2 && (0...760).contains($0[0]) && (0...300).contains($0[1]) }, "\(line)")
    }

    for side in ["A", "B"] {
      let runs = (json["jobs"] as? [[String: Any]] ?? []).filter { ($0["jobname"] as? String)?.hasSuffix("-" + side) == true }
      #expect(runs.count == 2)
      // The run with the middle rate stands for all: of two, the faster one.
      let run = try #require(runs.max { first, second in Self.iops(first) < Self.iops(second) })
      let latency = (run["read"] as? [String: Any])?["clat_ns"] as? [String: Any]
      let percentiles = try #require(latency?["percentile"] as? [String: Any])
      #expect(reader.cells.contains(Self.rate(Self.iops(run))), "\(Self.iops(run)) is not in \(reader.cells)")
      for percent in ["50.000000", "99.000000", "99.900000"] {
        let value = try #require(percentiles[percent] as? Double)
        // Half a unit may be rounded either way.
        let times = [value - 1, value, value + 1].map(Self.time)
        #expect(times.contains { reader.cells.contains($0) }, "\(percent): \(value) is not in \(reader.cells)")
      }
    }
  }

  private static func iops(_ job: [String: Any]) -> Double { (job["martlet"] as? [String: Any])?["requests_per_s"] as? Double ?? 0 }
}
