import Foundation
import Testing

/// `docs/cve-classes.md` and `docs/acceptance.md` name tests; each must exist under its name.
@Suite struct CatalogueTests {
  private static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()

  @Test(arguments: [("docs/cve-classes.md", 25), ("docs/acceptance.md", 29)])
  func everyTestThatTheCatalogueNamesExists(_ path: String, _ least: Int) throws {
    let text = try String(contentsOf: Self.root.appendingPathComponent(path), encoding: .utf8)
    let rows = text.split(separator: "\n").filter { $0.hasPrefix("| ") }.dropFirst()
    #expect(rows.count > least)
    var named: Set<String> = []
    for row in rows {
      let cells = row.split(separator: "|")
      try #require(cells.count == 3, "\(row)")
      let tests = cells[2].matches(of: #/`([A-Za-z][A-Za-z0-9-]+)`/#).map { String($0.1) }
      #expect(!tests.isEmpty || cells[2].contains("not built yet"), "\(row)")
      named.formUnion(tests)
    }
    let sources = try Self.text(below: "Tests", ending: "swift")
    let scenarios = try Self.text(below: "scripts/labparts/scenarios", ending: "py")
    for name in named {
      let isThere =
        sources.contains("func \(name)(") || scenarios.contains("def \(name.replacing("-", with: "_"))(")
        || sources.contains("name: \"\(name)\"") || Self.others.contains(name)
      #expect(isThere, "\(name) is no test")
    }
  }

  /// Made by a loop, and what is no test.
  private static let others: Set<String> = ["killed-supervisor", "killed-net0", "MARTLET_FULL"]

  private static func text(below directory: String, ending: String) throws -> String {
    let place = root.appendingPathComponent(directory)
    let files = try #require(FileManager.default.enumerator(at: place, includingPropertiesForKeys: nil))
    var all = ""
    for case let file as URL in files where file.pathExtension == ending { all += try String(contentsOf: file, encoding: .utf8) }
    return all
  }
}
