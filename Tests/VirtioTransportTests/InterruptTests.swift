import Testing
import VirtioSpec
import VirtioTransport

@Suite("Interrupts and device configuration")
struct InterruptTests {
  private func enabledDriver() throws -> GuestDriver {
    var driver = try GuestDriver()
    driver.writeConfiguration(driver.msixCapability + 2, 0x8000, 2)
    driver.start()
    _ = driver.takeEffects()
    return driver
  }

  @Test func vectorsAreMaskedAtFirstAndUnmaskingReportsTheMessage() throws {
    var driver = try enabledDriver()
    #expect(driver.read(0x801C) == 1)
    driver.write(0x8010, 0xFEE0_1000)
    driver.write(0x8014, 0x1)
    driver.write(0x8018, 0x4031)
    #expect(driver.takeEffects() == [])
    driver.write(0x801C, 0)
    let message = InterruptMessage(address: 0x1_FEE0_1000, data: 0x4031)
    #expect(driver.takeEffects() == [.vectorChanged(index: 1, message: message, isMasked: false)])
    driver.write(0x801C, 0xFFFF_FFFF)
    #expect(driver.takeEffects() == [.vectorChanged(index: 1, message: message, isMasked: true)])
    #expect(driver.read(0x801C) == 1)
    #expect(driver.read(0x8010, 8) == 0x1_FEE0_1000)
  }

  @Test func changingTheMessageOfAnUnmaskedVectorIsReported() throws {
    var driver = try enabledDriver()
    driver.write(0x8000, 0xFEE0_0000, 8)
    driver.write(0x8008, 0x20, 8)
    #expect(driver.takeEffects() == [.vectorChanged(index: 0, message: .init(address: 0xFEE0_0000, data: 0x20), isMasked: false)])
    driver.write(0x8008, 0x21)
    #expect(driver.takeEffects() == [.vectorChanged(index: 0, message: .init(address: 0xFEE0_0000, data: 0x21), isMasked: false)])
    driver.write(0x8008, 0x21)
    #expect(driver.takeEffects() == [])
  }

  @Test func functionMaskAndEnableBitMaskAllUnmaskedVectors() throws {
    var driver = try GuestDriver()
    driver.write(0x800C, 0)
    driver.write(0x802C, 0)
    #expect(driver.takeEffects() == [])
    let control = driver.msixCapability + 2
    driver.writeConfiguration(control, 0xC000, 2)
    #expect(driver.takeEffects() == [])
    driver.writeConfiguration(control, 0x8000, 2)
    #expect(
      driver.takeEffects() == [
        .vectorChanged(index: 0, message: .init(), isMasked: false),
        .vectorChanged(index: 2, message: .init(), isMasked: false),
      ])
    driver.writeConfiguration(control + 1, 0xC0, 1)
    #expect(driver.takeEffects().count == 2)
    #expect(driver.function.msix.vector(2).isMasked)
    driver.writeConfiguration(control, 0, 2)
    #expect(driver.takeEffects() == [])
  }

  @Test func pendingBitsShowTheSignalledMaskedVectors() throws {
    var driver = try enabledDriver()
    #expect(driver.function.readBAR(offset: 0xC000, width: 8, isSignalled: { $0 != 1 }) == 0b101)
    driver.write(0x802C, 0)
    #expect(driver.function.readBAR(offset: 0xC000, width: 4, isSignalled: { $0 != 1 }) == 0b001)
    driver.write(0xC000, 0xFFFF_FFFF)
    #expect(driver.function.readBAR(offset: 0xC000, width: 1) == 0)
    var asked: [Int] = []
    _ = driver.function.readBAR(
      offset: 0x8000, width: 8,
      isSignalled: {
        asked.append($0); return true
      })
    _ = driver.function.readBAR(
      offset: 0xC008, width: 8,
      isSignalled: {
        asked.append($0); return true
      })
    #expect(asked == [])
  }

  @Test func pendingBitsOfManyVectorsAreReadAtTheirOffsets() throws {
    var driver = try GuestDriver(queueSizes: Array(repeating: 16, count: 100))
    #expect(driver.function.msix.vectorCount == 101)
    #expect(driver.function.readBAR(offset: 0xC008, width: 8, isSignalled: { $0 == 64 || $0 == 100 }) == 1 | 1 << 36)
    #expect(driver.function.readBAR(offset: 0xC00C, width: 4, isSignalled: { $0 == 100 }) == 1 << 4)
  }

  @Test func configurationChangeMovesTheGenerationAndInterrupts() throws {
    var driver = try enabledDriver()
    #expect(driver.read(VirtioPCI.Common.configurationGeneration, 1) == 0)
    #expect(driver.read(0x2000, 8) == 0x0706_0504_0302_0100)
    #expect(driver.function.updateConfiguration(with: [0xFF]) == [.signal(vector: 0)])
    #expect(driver.read(VirtioPCI.Common.configurationGeneration, 1) == 0)
    #expect(driver.read(0x2000, 1) == 0xFF)
    #expect(driver.read(VirtioPCI.Common.configurationGeneration, 1) == 1)
    #expect(driver.read(0x1000, 1) == 2)
    #expect(driver.read(0x1000, 1) == 0)
    #expect(driver.function.updateConfiguration(with: [0xFF]) == [])
    #expect(driver.function.updateConfiguration(from: 95, with: [1, 2, 3]) == [.signal(vector: 0)])
    #expect(driver.read(0x2000 + 95, 4) == 1)
    #expect(driver.function.updateConfiguration(from: 96, with: [1]) == [])
    #expect(driver.function.updateConfiguration(from: -1, with: [1]) == [])
    #expect(driver.function.updateConfiguration(with: []) == [])
  }

  @Test func configurationChangeBeforeDriverOKInterruptsNobody() throws {
    var driver = try GuestDriver()
    driver.writeConfiguration(driver.msixCapability + 2, 0x8000, 2)
    driver.write(VirtioPCI.Common.configurationVector, 0, 2)
    #expect(driver.function.updateConfiguration(with: [0xFF]) == [])
    #expect(driver.read(0x2000, 1) == 0xFF)
  }

  @Test func onlyWritableBytesOfTheConfigurationAreWritten() throws {
    var driver = try enabledDriver()
    driver.write(0x2000 + 30, 0xAABB_CCDD)
    #expect(driver.takeEffects() == [.configurationWritten(offset: 32, bytes: [0xBB])])
    #expect(driver.read(0x2000 + 30) == 0x21BB_1F1E)
    driver.write(0x2000, 0, 8)
    #expect(driver.takeEffects() == [])
    #expect(driver.read(0x2000, 8) == 0x0706_0504_0302_0100)
    #expect(driver.read(0x2000 + 94, 8) == 0x5F5E)
    #expect(driver.read(0x2000 + 96, 8) == 0)
  }

  @Test func needsResetIsShownOnceAndEndsWithTheReset() throws {
    var driver = try enabledDriver()
    #expect(driver.function.setNeedsReset() == [.signal(vector: 0)])
    #expect(driver.function.setNeedsReset() == [])
    #expect(driver.status.contains(.needsReset))
    #expect(driver.read(0x1000, 1) == 2)
    driver.status = []
    #expect(driver.takeEffects() == [.reset])
    #expect(driver.function.setNeedsReset() == [])
    driver.function.resetCompleted()
    #expect(driver.status == [])
    #expect(driver.function.setNeedsReset() == [])
    #expect(driver.status == .needsReset)
  }

  @Test func withoutAVectorThereIsNoInterrupt() throws {
    var driver = try enabledDriver()
    driver.write(VirtioPCI.Common.configurationVector, 0xFFFF, 2)
    #expect(driver.function.setNeedsReset() == [])
    #expect(driver.status.contains(.needsReset))
  }
}
